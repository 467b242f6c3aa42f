"""A checkpoint is whole or refused; saving one never harms those before it; opening one runs no code."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gadfly.chat_template import load_renderer
from gadfly.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    drop_checkpoints_after,
    latest_checkpoint,
    open_checkpoint,
    point,
    prune_checkpoints,
    remove_unfinished,
    save_checkpoint,
)
from gadfly.discriminator import load_discriminator, new_discriminator, save_discriminator
from gadfly.errors import CheckpointError, RunFolderError
from gadfly.groups import Branch, Group
from gadfly.late_files import await_files
from gadfly.models import load_language_model, save_language_model
from gadfly.tensor_files import load_tensors, save_tensors

SOURCE = Path(__file__).resolve().parents[1] / "src"


def write(folder: Path) -> list[Path]:
    """A small stand-in for models and optimisers."""
    (folder / "student").mkdir()
    save_file({"w": torch.arange(6.0)}, folder / "student" / "model.safetensors")
    (folder / "student" / "config.json").write_text("{}")
    (folder / "trainer").mkdir()
    state = {"exp_avg.w": torch.ones(6), "step.w": torch.tensor(3.0)}
    return save_tensors(state, folder / "trainer" / "student")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A stage with the checkpoints 2, 4, 6."""
    stage = tmp_path / "gad"
    for step in (2, 4, 6):
        save_checkpoint(stage, step, write, {"best": [2, 0.5]})
    return stage


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link under a folder."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_what_is_saved_is_what_is_opened(stage: Path) -> None:
    saved = save_checkpoint(stage, 8, write, {"best": [8, 0.75], "seconds": 1.5})
    assert saved == Checkpoint(stage / "step-000008", 8, {"best": [8, 0.75], "seconds": 1.5}, saved.digest)
    assert latest_checkpoint(stage) == open_checkpoint(stage / "latest") == saved
    assert checkpoint_steps(stage) == [2, 4, 6, 8]
    assert os.readlink(stage / "latest") == "step-000008"


def test_equal_models_have_an_equal_digest_whatever_the_time(tmp_path: Path) -> None:
    def write_other(folder: Path) -> list[Path]:
        written = write(folder)
        save_file({"w": torch.zeros(6)}, folder / "student" / "model.safetensors")
        return written

    saved = [save_checkpoint(tmp_path / f"{n}", 2, write, {"seconds": float(n)}) for n in range(6)]
    assert len({checkpoint.digest for checkpoint in saved}) == 1
    assert save_checkpoint(tmp_path / "other", 2, write_other, {}).digest != saved[0].digest


def test_a_stage_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "gad") is None
    assert checkpoint_steps(tmp_path / "gad") == []


def test_an_edited_file_is_named_with_a_way_out(stage: Path) -> None:
    file = stage / "step-000006" / "student" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert refusal(stage / "latest") == (
        f"{file}: altered since it was saved; "
        f"restore it, or delete {stage / 'step-000006'} to go on from step 4"
    )
    with pytest.raises(CheckpointError):
        latest_checkpoint(stage)
    shutil.rmtree(stage / "step-000006")
    latest = latest_checkpoint(stage)
    assert latest is not None
    assert latest.step == 4


def test_a_missing_file_is_named_with_a_way_out(stage: Path) -> None:
    shutil.rmtree(stage / "step-000002")
    shutil.rmtree(stage / "step-000004")
    file = stage / "step-000006" / "student" / "config.json"
    file.unlink()
    assert refusal(stage / "step-000006") == (
        f"{file}: missing, so the checkpoint is incomplete; "
        f"restore it, or delete {stage / 'step-000006'} to go on from the stage's start"
    )


def test_a_missing_manifest_is_not_passed_over(stage: Path) -> None:
    manifest = stage / "step-000006" / "manifest.json"
    manifest.unlink()
    with pytest.raises(CheckpointError) as refused:
        latest_checkpoint(stage)
    assert str(refused.value) == (
        f"{manifest}: missing, so this is no whole checkpoint; "
        f"restore it, or delete {stage / 'step-000006'} to go on from step 4"
    )


@pytest.mark.parametrize("text", ['{"step": 6, "files": {"a', "", "[1]", '{"step": 6}', '"a"', "\xff", "{}"])
def test_a_damaged_manifest_is_named_with_a_way_out(stage: Path, text: str) -> None:
    manifest = stage / "step-000006" / "manifest.json"
    manifest.write_bytes(text.encode("latin-1"))
    message = refusal(stage / "step-000006")
    assert message.startswith(f"{manifest}: not a manifest (")
    assert message.endswith(f"; restore it, or delete {stage / 'step-000006'} to go on from step 4")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "student/../../outside", "link", "a\0b"])
def test_a_manifest_that_lists_a_file_outside_is_refused(stage: Path, name: str) -> None:
    (stage / "outside").write_text("secret")
    (stage / "step-000006" / "link").symlink_to("../outside")
    manifest = stage / "step-000006" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = "0" * 64
    manifest.write_text(json.dumps(content))
    expected = f"{manifest}: lists {name!r}, outside the folder; do not use it"
    assert refusal(stage / "step-000006") == expected


@pytest.mark.parametrize(
    ("key", "value"), [("step", 4), ("facts", {"best": [2, 0.9]}), ("files", {}), ("more", 1)]
)
def test_an_edited_manifest_is_noticed(stage: Path, key: str, value: object) -> None:
    manifest = stage / "step-000006" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), key: value}))
    assert refusal(stage / "latest") == (
        f"{manifest}: altered since it was saved; "
        f"restore it, or delete {stage / 'step-000006'} to go on from step 4"
    )


def test_facts_are_as_saved_whatever_their_keys(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "gad", 2, write, {"by step": {10: 0.1, 9: 1e-7}, "a": float("inf")})
    assert open_checkpoint(saved.path).facts == {"by step": {"10": 0.1, "9": 1e-7}, "a": float("inf")}


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(stage: Path) -> None:
    shutil.rmtree(stage / "step-000004")
    (stage / "step-000006").rename(stage / "step-000004")
    assert refusal(stage / "step-000004") == (
        f"{stage / 'step-000004' / 'manifest.json'}: of step 6, in a folder of step 4; "
        f"restore it, or delete {stage / 'step-000004'} to go on from step 2"
    )
    (stage / "step-000004").rename(stage / "start")
    assert open_checkpoint(stage / "start").step == 6


@pytest.mark.parametrize(
    "name",
    [
        "trainer/student/stray.safetensors",
        "trainer/student/._stray.safetensors",
        "student/special_tokens_map.json",
        "student/optimizer.pt",
        "student/manifest.json",
        "note.txt",
    ],
)
def test_a_file_that_was_not_saved_with_it_is_refused(stage: Path, name: str) -> None:
    stray = stage / "step-000006" / name
    stray.write_text("{}")
    assert refusal(stage / "step-000006") == f"{stray}: not saved with this checkpoint; remove it"


def test_a_link_that_was_not_saved_with_it_is_refused(stage: Path, tmp_path: Path) -> None:
    stray = stage / "step-000006" / "student" / "additional_chat_templates"
    stray.symlink_to(tmp_path)
    assert refusal(stage / "step-000006") == f"{stray}: not saved with this checkpoint; remove it"


def test_an_added_file_cannot_steer_the_terminal(stage: Path) -> None:
    (stage / "step-000006" / "a\x1b[2J\nb").touch()
    assert "a\\x1b[2J\\nb" in refusal(stage / "step-000006")


def test_what_systems_leave_in_a_folder_is_no_part_of_it(stage: Path) -> None:
    student = stage / "step-000006" / "student"
    for name in (".DS_Store", "._config.json", ".nfs000000000a"):
        (student / name).touch()
    (student / ".cache" / "huggingface").mkdir(parents=True)
    (student / ".cache" / "huggingface" / "upload.lock").touch()
    assert open_checkpoint(stage / "step-000006").step == 6


def test_a_folder_that_is_no_checkpoint_of_ours_is_never_to_be_deleted(tmp_path: Path, stage: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    advice = "give a folder such as RUN/gad/step-000400"
    assert refusal(model) == f"{model / 'manifest.json'}: missing, so this is no whole checkpoint; {advice}"
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such checkpoint; {advice}"
    file = stage / "step-000006" / "manifest.json"
    assert refusal(file) == f"{file}: no such checkpoint; {advice}"


def test_other_folders_of_a_stage_are_left_alone(stage: Path) -> None:
    for name in ("step-000006-backup", "step-old", "step-7"):
        shutil.copytree(stage / "step-000006", stage / name)
    assert checkpoint_steps(stage) == [2, 4, 6]
    prune_checkpoints(stage, 1, None)
    drop_checkpoints_after(stage, 0)
    assert {"step-000006-backup", "step-old", "step-7"} == {path.name for path in stage.iterdir()}


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_full_disk_leaves_earlier_checkpoints_untouched(stage: Path, failure: Exception) -> None:
    before = contents(stage)

    def write_half(folder: Path) -> list[Path]:
        write(folder)
        raise failure

    with pytest.raises(RunFolderError) as refused:
        save_checkpoint(stage, 8, write_half, {})
    assert str(refused.value) == (
        f"{stage / 'step-000008'}: the checkpoint could not be written ({failure}); "
        f"earlier ones are untouched. Make room or mend the folder, and run the same command to go on."
    )
    assert contents(stage) == before
    latest = latest_checkpoint(stage)
    assert latest is not None
    assert latest.step == 6


def test_a_bug_while_saving_stays_a_bug_and_leaves_nothing_behind(stage: Path) -> None:
    before = contents(stage)

    def write_wrong(folder: Path) -> list[Path]:
        write(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_checkpoint(stage, 8, write_wrong, {})
    assert contents(stage) == before


def test_whatever_part_the_disk_has_no_room_for_is_a_users_error(stage: Path, tiny_model: Path) -> None:
    before = contents(stage)
    parts = ("model", "tokenizer", "discriminator", "tensors")
    code = """
        import resource, sys
        from pathlib import Path
        from gadfly.checkpoint import save_checkpoint
        from gadfly.discriminator import new_discriminator, save_discriminator
        from gadfly.errors import RunFolderError
        from gadfly.models import load_language_model, save_language_model
        from gadfly.tensor_files import save_tensors

        stage, tiny, *parts = sys.argv[1:]
        model, renderer = load_language_model(tiny, "float32")
        discriminator, _ = new_discriminator(tiny, "float32", 0)
        write = {
            "model": lambda folder: save_language_model(model, renderer.tokenizer, folder),
            "tokenizer": lambda folder: renderer.tokenizer.save_pretrained(folder),
            "discriminator": lambda folder: save_discriminator(discriminator, renderer, folder / "d", []),
            "tensors": lambda folder: save_tensors(dict(model.named_parameters()), folder / "t"),
        }
        # No file may be larger. The model's config and the tokenizer's are, by all of these.
        for limit in (400, 20):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for part in parts:
                try:
                    save_checkpoint(Path(stage), 8, lambda folder: write[part](folder) or [], {})
                except RunFolderError as refusal:
                    print(refusal)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), stage, tiny_model, *parts]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(parts)
    for line in lines:
        assert line.startswith(f"{stage / 'step-000008'}: the checkpoint could not be written (")
        assert "earlier ones are untouched" in line
    assert contents(stage) == before


@pytest.mark.slow
def test_a_file_of_another_machine_that_never_comes_is_named(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(b"12345")
    await_files(tmp_path, {"whole": 5})
    (tmp_path / "half").write_bytes(b"12")
    with pytest.raises(RunFolderError) as refused:
        await_files(tmp_path, {"whole": 5, "half": 4000})
    assert str(refused.value) == (
        f"{tmp_path / 'half'}: 2 of the 4,000 bytes that another process wrote are seen here after 90 s; "
        f"put the run folder where all machines see the same"
    )


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "gad").touch()
    with pytest.raises(RunFolderError, match="could not be written"):
        save_checkpoint(tmp_path / "gad", 2, write, {})


def test_a_step_saved_again_replaces_the_first(stage: Path) -> None:
    (stage / "step-000006" / "manifest.json").unlink()
    save_checkpoint(stage, 6, write, {"again": True})
    assert open_checkpoint(stage / "step-000006").facts == {"again": True}
    assert sorted(path.name for path in stage.glob(".*")) == []


def test_the_newest_and_the_best_are_kept(stage: Path) -> None:
    save_checkpoint(stage, 8, write, {})
    prune_checkpoints(stage, 2, 2)
    assert checkpoint_steps(stage) == [2, 6, 8]
    prune_checkpoints(stage, 2, None)
    assert checkpoint_steps(stage) == [6, 8]
    prune_checkpoints(stage, 5, None)
    assert checkpoint_steps(stage) == [6, 8]
    assert sorted(path.name for path in stage.iterdir()) == ["latest", "step-000006", "step-000008"]


def test_going_back_drops_what_is_newer_and_moves_the_links(stage: Path) -> None:
    point(stage / "best", stage / "step-000006")
    drop_checkpoints_after(stage, 4)
    assert checkpoint_steps(stage) == [2, 4]
    assert os.readlink(stage / "latest") == "step-000004"
    assert not (stage / "best").is_symlink()
    drop_checkpoints_after(stage, 0)
    assert list(stage.iterdir()) == []


def test_what_a_kill_in_mid_save_left_is_cleared_away(stage: Path) -> None:
    before = contents(stage)
    (stage / ".step-000008.tmp" / "student").mkdir(parents=True)
    (stage / ".step-000002.old").mkdir()
    # Killed between the rename of step 6 and the move of the link.
    point(stage / "latest", stage / "step-000004")
    remove_unfinished(stage)
    assert contents(stage) == before


def test_tensors_are_read_into_place(tmp_path: Path) -> None:
    saved = {"exp_avg.a": torch.randn(3, 2), "step.a": torch.tensor(7.0), "b": torch.randn(2).bfloat16()}
    save_tensors(dict(saved), tmp_path / "tensors")
    read = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    places = {name: tensor.data_ptr() for name, tensor in read.items()}
    load_tensors(read, tmp_path / "tensors")
    for name, tensor in saved.items():
        assert torch.equal(read[name], tensor)
        assert read[name].data_ptr() == places[name]


def test_who_saves_tensors_learns_which_files_they_are_in(tmp_path: Path) -> None:
    written = save_tensors({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "tensors")
    assert written == list((tmp_path / "tensors").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("wanted", "mismatch"),
    [
        ({"a": (2, 3), "b": (1,)}, "a has shape (3, 2) there, (2, 3) here"),
        ({"a": (3, 2), "b": (1,), "c": ()}, "c has shape missing there, () here"),
        ({"a": (3, 2)}, "b has shape (1,) there, missing here"),
    ],
)
def test_tensors_of_another_model_are_refused(
    tmp_path: Path, wanted: dict[str, tuple[int, ...]], mismatch: str
) -> None:
    save_tensors({"a": torch.ones(3, 2), "b": torch.ones(1)}, tmp_path / "tensors")
    given = {name: torch.zeros(shape) for name, shape in wanted.items()}
    with pytest.raises(CheckpointError) as refused:
        load_tensors(given, tmp_path / "tensors")
    assert str(refused.value) == f"{tmp_path / 'tensors'}: of another model than the recipe's: {mismatch}"
    assert all(not tensor.any() for tensor in given.values())


def test_tensors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3, 2)}, tmp_path / "tensors")
    (file,) = (tmp_path / "tensors").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    for folder in (tmp_path / "tensors", tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"cannot be read: .*; restore it from an intact copy"):
            load_tensors({"a": torch.ones(3, 2)}, folder)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_opening_a_checkpoint_runs_no_pickle(stage: Path, tmp_path: Path) -> None:
    folder = stage / "step-000006" / "trainer"
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    mark = tmp_path / "mark"
    for name in (".metadata", "optimizer.pt", "pytorch_model.bin", "__0_0.distcp"):
        (folder / "student" / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert "not saved with this checkpoint" in refusal(stage / "step-000006")
    tensors = {"exp_avg.w": torch.zeros(6), "step.w": torch.tensor(0.0)}
    load_tensors(tensors, folder / "student")
    assert torch.equal(tensors["exp_avg.w"], torch.ones(6))
    assert not mark.exists()


def test_student_and_discriminator_open_as_what_they_are(tmp_path: Path, tiny_model: Path) -> None:
    student, renderer = load_language_model(str(tiny_model), "float32")
    discriminator, _ = new_discriminator(str(tiny_model), "float32", 5)
    prompt = tuple(renderer.tokenizer("abc")["input_ids"])
    answer = Branch(tuple(renderer.response_tokens("xyz", True)), True, "xyz")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)

    def write_models(folder: Path) -> list[Path]:
        save_language_model(student, renderer.tokenizer, folder / "student")
        save_discriminator(
            discriminator, renderer, folder / "discriminator", [Group("a", prompt, teachers=(answer,))]
        )
        return []

    checkpoint = save_checkpoint(tmp_path / "gad", 2, write_models, {})
    opened = AutoModelForCausalLM.from_pretrained(checkpoint.path / "student")
    assert open_checkpoint(checkpoint.path) == checkpoint, "opening it adds nothing"
    for name, tensor in student.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path / "student")
    again = load_renderer(tokenizer, opened.generation_config)
    assert again.end_ids == renderer.end_ids
    assert again.response_tokens("<|im_end|> a", True) == renderer.response_tokens("<|im_end|> a", True)
    reloaded, _ = load_discriminator(checkpoint.path / "discriminator")
    assert torch.equal(reloaded.score_head.weight, discriminator.score_head.weight)
    head = load_file(checkpoint.path / "discriminator" / "score_head.safetensors")
    assert set(head) == {"weight", "bias"}
    for name, tensor in discriminator.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
