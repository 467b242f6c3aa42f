"""A recipe from a stranger: it runs no code, writes into no folder of something else, and errs in lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadfly.errors import ConfigError, RunFolderError
from gadfly.recipe_file import load_recipe
from gadfly.stages.judge.judge_prompt import load_prompt
from gadfly.stages.run import open_run

SOURCE = Path(__file__).resolve().parents[1] / "src"
PLAIN = 'name = "a"\n[student]\nmodel = "m"\n[data]\ntrain = "rows.jsonl"\n'
STEER = "\\u001b]0;owned\\u0007\\u009b31m\\u202e"


def gadfly(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "gadfly", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def recipe(tmp_path: Path, more: str = "", plain: str = PLAIN) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(plain + more, encoding="utf-8")
    return path


PIECES = ["=", "[", "]", "{", "}", '"', "\n", "name", "student", "model", ".", "1e999", "nan", '"""', "\x00"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=15).map(lambda x: "".join(x).encode())
)
def test_any_bytes_are_a_recipe_or_a_line_for_each_mistake(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_recipe(path)


@pytest.mark.parametrize(
    "more",
    [
        "a = " + "[" * 100_000,
        "a = " + "{a = " * 50_000,
        "a" + ".a" * 2000 + " = 1",
        "seed = " + "9" * 5000,
        "seed = " + "9" * 4000,
        "seed = 0x" + "f" * 10_000,
        'a = "' + "x" * 10_000_000,
        "[student]\nmodel = 'again'",
        "\x00",
    ],
    ids=["lists", "tables", "dots", "too many digits", "digits", "hexadecimal", "10 MB", "twice", "null"],
)
def test_a_recipe_made_to_choke_a_reader_is_refused(more: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_recipe(recipe(tmp_path, plain=more + "\n" + PLAIN))


@pytest.mark.parametrize(
    "key",
    [
        "run_folder",
        "data.train",
        "student.model",
        "discriminator.model",
        "gad.start_from",
        "judge.tell_model",
    ],
)
def test_no_path_or_name_holds_a_null_byte(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = '\S*a\\x00b': .*null byte"):
        load_recipe(recipe(tmp_path), [f'{key}="a\\u0000b"'])


def test_a_wrong_value_of_ten_megabytes_is_told_in_a_short_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_recipe(recipe(tmp_path, plain=f"seed = '{'x' * 10_000_000}'\n" + PLAIN))
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", ".", "a/b", "a\\u0000", ".git", "-rf", "~", ""])
def test_no_name_of_a_run_or_a_test_set_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    for override in (f'name="{name}"', f'data.test={{"{name}" = "rows.jsonl"}}'):
        with pytest.raises(ConfigError, match="use letters, digits"):
            load_recipe(recipe(tmp_path), [override])


def test_the_folder_of_a_model_is_no_run_folder_and_stays_as_it_is(tmp_path: Path, tiny_model: Path) -> None:
    before = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    loaded = load_recipe(recipe(tmp_path), [f'run_folder="{tiny_model}"'])
    try:
        with (
            pytest.raises(RunFolderError, match=r"config\.json is no recipe's.*choose another"),
            open_run(loaded),
        ):
            pass
    finally:
        (tiny_model / ".lock").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in tiny_model.iterdir()} == before


@pytest.mark.parametrize("key", ["trust_remote_code", "student.trust_remote_code", "data.trust_remote_code"])
def test_no_key_of_a_recipe_lets_code_of_a_model_run(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        load_recipe(recipe(tmp_path), [f"{key}=true"])


def test_a_recipe_alone_runs_none_of_the_code_beside_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("rewards.py", "sitecustomize.py", "conftest.py"):
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    path = recipe(tmp_path, '[gad.rewards.a]\nfunction = "rewards.py:f"\nweight = 1.0\n')
    for stage in ("gad", "run"):
        done = gadfly(stage, path)
        assert done.returncode == 2
        assert "--allow-code" in done.stderr
        assert "Traceback" not in done.stderr
    for stage in ("plan", "audit"):
        assert "Traceback" not in gadfly(stage, path).stderr
    assert not mark.exists()


def test_nothing_a_recipe_says_steers_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    path = recipe(tmp_path)
    for arguments in (
        ("report", path, f'run_folder="{tmp_path}/{STEER}"'),
        ("seqkd", path, f'data.train="{STEER}.jsonl"'),
        ("plan", path, f'student.model="{STEER}"'),
    ):
        done = gadfly(*arguments)
        assert "Traceback" not in done.stderr
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.stdout + done.stderr)


@pytest.mark.parametrize("content", [b"\xff", b"\x00", b"[" * 10**6, b"{" * 10**6, b"{x}" * 10**5])
def test_any_file_is_a_judge_prompt_or_a_line_for_each_mistake(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(ConfigError):
        load_prompt(str(tmp_path / "prompt.txt"))
