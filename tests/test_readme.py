"""What a reader is told is executed: commands, recipe and code of README.md, links of all pages."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gadfly.cli import app
from gadfly.recipe_file import load_recipe
from gadfly.stages.pipeline import STAGES

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
OWN = ("recipe.toml", "runs/mine", "runs/mine/gad")
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]

SMALL = """
[evaluation]
prompts = 4
[warmup]
max_steps = 1
discriminator_only_steps = 1
batch_prompts = 4
group_size = 2
[gad]
max_steps = 1
batch_prompts = 2
group_size = 2
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    fenced = "\n".join(blocks("sh"))
    indented = "\n".join(re.findall(r"^    (scripts/\S+.*)$", README, flags=re.M))
    lines = (fenced + "\n" + indented).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, teacher_file: Path) -> Path:
    """A folder as the README asks for: train.jsonl, test.jsonl, and its recipe, made small."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "train.jsonl").write_bytes(teacher_file.read_bytes())
    others = teacher_file.read_text(encoding="utf-8").replace("say ", "tell me of ")
    (folder / "test.jsonl").write_text(others, encoding="utf-8")
    recipe = blocks("toml")[0].replace("Qwen/Qwen2.5-0.5B-Instruct", str(tiny_model))
    recipe = recipe.replace("max_response_tokens = 512", "max_response_tokens = 12")
    recipe = recipe.replace("[seqkd]", "[seqkd]\nmax_steps = 2\nbatch_prompts = 4")
    (folder / "recipe.toml").write_text(recipe + SMALL, encoding="utf-8")
    return folder


def test_the_readme_is_short_and_holds_its_promises() -> None:
    assert 100 <= len(README.splitlines()) <= 130
    assert {"scripts/demo", "scripts/test"} <= set(commands())


def test_every_command_is_one_that_the_tests_know() -> None:
    known = ("scripts/demo", "scripts/test", "scripts/install", ". .venv/bin/activate", "gadfly ")
    known += (".venv/bin/python scripts/fetch-smollm2",)
    assert [command for command in commands() if not command.startswith(known)] == []


def test_every_script_of_the_readme_is_there_and_runs() -> None:
    scripts = {word for command in commands() for word in command.split() if word.startswith("scripts/")}
    assert len(scripts) >= 4
    for script in scripts:
        assert os.access(CHECKOUT / script, os.X_OK), script


def test_the_commands_for_ones_own_data_do_what_they_say(readme_folder: Path) -> None:
    own = [line for line in commands() if line.startswith("gadfly ") and line.split()[2] in OWN]
    assert len(own) >= 5
    for command in own[:1] + own[2:]:
        arguments = [sys.executable, "-m", "gadfly", *command.split()[1:]]
        done = subprocess.run(
            arguments, cwd=readme_folder, input="", capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    run = readme_folder / "runs" / "mine"
    for name in ("metrics.jsonl", "samples.jsonl", "generations", "summary.json", "report.html"):
        assert (run / name).exists(), name


def test_a_changed_setting_of_the_readme_is_one_that_the_recipe_knows(readme_folder: Path) -> None:
    command = next(line for line in commands() if "gad.kl_coefficient" in line)
    recipe = load_recipe(readme_folder / "recipe.toml", command.split()[3:])
    assert recipe.gad.kl_coefficient == 0.01


def test_the_long_command_names_a_recipe_and_keys_that_exist(tmp_path: Path) -> None:
    command = next(line for line in commands() if "recipes/smollm2-cpu.toml" in line)
    words = shlex.split(command)
    recipe = load_recipe(CHECKOUT / words[2], words[3:])
    assert recipe.data.train == str(Path.cwd() / "train.jsonl")
    assert recipe.data.test == {"own": str(Path.cwd() / "test.jsonl")}


def test_prompts_and_a_teacher_stand_where_the_answers_would(tmp_path: Path) -> None:
    own, asked = blocks("toml")
    data, teacher = asked.split("[teacher]")
    prompts = data.removeprefix("[data]\n")
    text = own.replace('train = "train.jsonl"\n', prompts) + "[teacher]" + teacher
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe.data.train is None
    assert Path(str(recipe.data.prompts)).name == "prompts.jsonl"
    assert recipe.teacher.model


def test_the_library_example_runs(readme_folder: Path) -> None:
    code = blocks("python")[0].replace('["gad.max_steps=200"]', "[]")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=readme_folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_checkpoints_open_as_the_readme_says(readme_folder: Path) -> None:
    call = re.search(r"`(AutoModelForCausalLM\.from_pretrained\(.*?\))`", README)
    assert call is not None
    code = f"from transformers import AutoModelForCausalLM\n{call[1]}"
    done = subprocess.run([sys.executable, "-c", code], cwd=readme_folder, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("path", sorted((CHECKOUT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_is_valid_and_says_where_its_numbers_come_from(path: Path) -> None:
    load_recipe(path, ["data.train=train.jsonl"])
    assert path.read_text(encoding="utf-8").startswith("#")


def test_every_number_of_the_paper_recipe_has_its_origin() -> None:
    path = CHECKOUT / "recipes" / "paper-qwen2.5-7b.toml"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"= *[\d\[]", line)]
    bare = [line for line in lines if "#" not in line]
    # A value that stands again in another section has its origin where it stood first.
    first = {re.sub(r" *#.*", "", line) for line in lines if "#" in line}
    assert [line for line in bare if line not in first and line not in ("seed = 0",)] == []
    assert tomllib.loads(path.read_text(encoding="utf-8"))["gad"]["group_size"] == 8


def test_help_names_every_stage() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    assert {"run", "demo", *STAGES} <= names
