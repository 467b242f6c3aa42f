"""A model is known by all that decides what it says, wherever its folder lies."""

import shutil
from pathlib import Path

import pytest

from gadfly.errors import RunFolderError
from gadfly.model_identity import model_identity
from gadfly.recipe_file import load_recipe
from gadfly.stages.run import open_run
from gadfly.stages.sft import seqkd


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_another_part_makes_another_model(name: str, tmp_path: Path) -> None:
    part = tmp_path / "model" / name
    part.parent.mkdir(parents=True)
    identities = {model_identity(str(tmp_path / "model"))}
    for content in ("a", "b"):
        part.write_text(content, encoding="utf-8")
        identities.add(model_identity(str(tmp_path / "model")))
    assert len(identities) == 3


def test_a_moved_folder_and_a_note_in_it_make_no_other_model(tmp_path: Path, tiny_model: Path) -> None:
    moved = tmp_path / tiny_model.name
    shutil.copytree(tiny_model, moved)
    (moved / "README.md").write_text("a note", encoding="utf-8")
    assert model_identity(str(moved)) == model_identity(str(tiny_model))


def test_a_stage_does_not_go_on_with_another_chat_template(
    recipe_file: Path, tmp_path: Path, tiny_model: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    options = [f"student.model={model}", "seqkd.max_steps=1"]
    with open_run(load_recipe(recipe_file, options)) as run:
        seqkd(run)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with (
        open_run(load_recipe(recipe_file, options)) as run,
        pytest.raises(RunFolderError, match=r"student\.model = 'model \(.*\)', now 'model \("),
    ):
        seqkd(run)
