"""What is done with a trained student: export and chat."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gadfly.checkpoint import latest_checkpoint
from gadfly.cli import app
from gadfly.errors import CheckpointError, UserError
from gadfly.models import load_language_model
from gadfly.recipe_file import load_recipe
from gadfly.stages.chat import Chat
from gadfly.stages.export import export
from gadfly.stages.run import open_run
from gadfly.stages.sft import seqkd


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: str) -> dict[int, Path]:
    """The seqkd stage of a run, by LoRA rank; 0 is full fine-tuning."""
    folders = {}
    for rank in (0, 4):
        path = tmp_path_factory.mktemp(f"rank-{rank}") / "recipe.toml"
        path.write_text(tiny_recipe, encoding="utf-8")
        with open_run(load_recipe(path, [f"student.lora_rank={rank}"])) as run:
            seqkd(run)
            folders[rank] = run.folder.stage("seqkd")
    return folders


@pytest.mark.parametrize("rank", [0, 4])
def test_an_exported_student_is_a_plain_folder_that_computes_the_same(
    stages: dict[int, Path], tmp_path: Path, rank: int
) -> None:
    export(str(stages[rank]), tmp_path / "out", "float32")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    checkpoint = latest_checkpoint(stages[rank])
    assert checkpoint is not None
    trained, renderer = load_language_model(str(checkpoint.path / "student"), "float32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_chat_template() == renderer.tokenizer.get_chat_template()
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(exported(ids).logits, trained(ids).logits)


def test_an_export_has_the_type_that_was_asked_for(stages: dict[int, Path], tmp_path: Path) -> None:
    export(str(stages[0] / "latest"), tmp_path / "out", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_an_export_never_overwrites(stages: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; give another folder"):
        export(str(stages[0]), tmp_path, "float32")


def test_a_full_disk_is_told_in_a_line(stages: dict[int, Path], tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the settings, too little for the weights.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=f"{tmp_path / 'out'}: cannot be written: "):
            export(str(stages[0]), tmp_path / "out", "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not (tmp_path / "out").exists()


def test_an_altered_checkpoint_is_not_exported(
    stages: dict[int, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copied = tmp_path_factory.mktemp("copied") / "seqkd"
    shutil.copytree(stages[0], copied, symlinks=True)
    (copied / "latest" / "student" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: altered since it was saved"):
        export(str(copied), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_a_seed_decides_the_answers_of_a_chat(stages: dict[int, Path]) -> None:
    def talk(seed: int) -> list[str]:
        chat = Chat(str(stages[0]), system="Be brief.", temperature=1.0, max_tokens=12, seed=seed)
        return [chat.answer("say 3"), chat.answer("say 4")]

    assert talk(0) == talk(0) != talk(1)


def test_a_chat_gives_the_student_all_turns_so_far(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "two-turns")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    refusal = "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "two-turns")
    chat = Chat(str(tmp_path / "two-turns"), system=None, temperature=0.0, max_tokens=2, seed=0)
    chat.answer("one")
    chat.answer("two")
    with pytest.raises(UserError, match="roles user, assistant, user, assistant, user: too long"):
        chat.answer("three")


def test_a_conversation_beyond_the_positions_is_told_before_it_is_read(tiny_model: Path) -> None:
    positions = AutoConfig.from_pretrained(tiny_model).max_position_embeddings
    chat = Chat(str(tiny_model), system=None, temperature=0.0, max_tokens=positions, seed=0)
    # What is left of them is the answer's.
    chat.answer("one")
    with pytest.raises(UserError, match=rf"no room for an answer in the student's {positions} positions"):
        chat.answer("one " * positions)


def test_chat_answers_each_line_and_ends_with_the_input(stages: dict[int, Path]) -> None:
    arguments = ["chat", str(stages[0]), "--temperature", "0", "--max-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "gadfly", *arguments],
        input="say 3\n\nsay 4\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    chat = Chat(str(stages[0]), system=None, temperature=0.0, max_tokens=12, seed=0)
    answers = [chat.answer(text) for text in ("say 3", "say 4")]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)


def test_what_cannot_be_opened_is_told_in_a_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert isinstance(done.exception, UserError)
    assert "nowhere" in str(done.exception)
    assert "\n" not in str(done.exception)
