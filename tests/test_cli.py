"""Exit codes and what is said: a line for a user's error, a traceback for a bug, a line when stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gadfly
from gadfly.recipe_file import load_recipe
from gadfly.stages.run import open_run

SOURCE = Path(__file__).resolve().parents[1] / "src"
COMMANDS = (
    "run",
    "collect",
    "audit",
    "audit-warmup",
    "seqkd",
    "warmup",
    "gad",
    "best",
    "seqkd-equal-time",
    "generate",
    "judge",
    "report",
    "plan",
    "demo",
    "chat",
    "export",
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gadfly", *map(str, arguments)]


def environment(*first: Path) -> dict[str, str]:
    paths = [*map(str, first), str(SOURCE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "80"}


def run_gadfly(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), check=False, timeout=120
    )


def imported(*arguments: object) -> set[str]:
    """Top-level packages that a command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gadfly", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_help_and_version_are_told() -> None:
    shown = run_gadfly("--help")
    assert shown.returncode == 0
    assert all(f"  {name} " in shown.stdout for name in COMMANDS)
    assert run_gadfly("--version").stdout == f"gadfly {gadfly.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    shown = run_gadfly(name, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"Usage: python -m gadfly {name} ")
    assert shown.stderr == ""
    if name not in ("demo", "chat", "export"):
        assert "gad.group_size=4" in shown.stdout


def test_no_command_shows_the_help_and_is_an_error() -> None:
    nothing = run_gadfly()
    assert nothing.returncode == 2
    assert "Commands:" in nothing.stdout + nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gda"], "No such command 'gda'"),
        (["gad"], "Missing argument"),
        (["gad", "--fast", "recipe.toml"], "No such option: --fast"),
    ],
)
def test_a_slip_in_the_command_is_a_users_error(arguments: list[str], message: str) -> None:
    refused = run_gadfly(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help_and_mistakes_are_quick(tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "matplotlib", "datasets", "pyarrow", "scipy", "sklearn"}
    assert "gadfly" in imported("--help")
    assert not imported("--help") & {*heavy, "pydantic", "numpy"}
    path = tmp_path / "recipe.toml"
    path.write_text('name = "a"\n')
    assert "pydantic" in imported("gad", path)
    assert not imported("gad", path) & heavy


def test_the_report_needs_no_torch_and_comes_while_the_run_goes_on(recipe_file: Path) -> None:
    refused = run_gadfly("report", recipe_file)
    assert refused.returncode == 2
    assert "no run has begun there" in refused.stderr
    folder = recipe_file.parent / "runs" / "tiny"
    assert not folder.exists()
    with open_run(load_recipe(recipe_file)):
        begun = (folder / "config.json").read_bytes()
        found = imported("report", recipe_file, "seed=5")
        assert (folder / "config.json").read_bytes() == begun, "the run's, whatever the report is told"
    assert (folder / "report.html").exists()
    assert "matplotlib" in found
    assert not found & {"torch", "transformers"}


def test_each_mistake_of_a_recipe_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "pirate.toml"
    path.write_text('name = "pirate"\n[gad]\ngroup_sise = 4\n')
    refused = run_gadfly("gad", path, "seed=-1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.splitlines() == [
        "command line: seed = -1: input should be greater than or equal to 0",
        "pirate.toml: student.model: must be given (A Hugging Face name or a folder)",
        "pirate.toml: gad.group_sise: unknown key; did you mean 'group_size'?",
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("gad", "seed=0", "gad needs a discriminator: "),
        ("seqkd", "data.train=none.jsonl", "none.jsonl': no such file; "),
        ("seqkd", "student.model=none", "model 'none' cannot be opened: "),
        ("seqkd", "run_folder=recipe.toml/run", "run_folder = "),
    ],
)
def test_a_users_error_is_one_line(recipe_file: Path, stage: str, override: str, message: str) -> None:
    refused = subprocess.run(
        command(stage, recipe_file, override),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=recipe_file.parent,
        check=False,
        timeout=120,
    )
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert message in line
    assert refused.stdout == ""


def test_weights_that_are_no_numbers_end_the_run(recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(tiny_model, spoilt)
    weights = load_file(spoilt / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    stopped = run_gadfly("seqkd", recipe_file, f"student.model={spoilt}")
    assert stopped.returncode == 4
    line = stopped.stderr.splitlines()[-1]
    assert line.startswith("seqkd step 0: log-probabilities of 4 of 4 samples are not finite")
    assert "Last good checkpoint: none yet." in line
    assert 'with alarms.actions.not-finite="roll_back" it does so at half the learning rates' in line
    assert "Traceback" not in stopped.stderr
    assert not list((recipe_file.parent / "runs" / "tiny" / "seqkd").glob("step-*"))


def test_a_bug_keeps_its_traceback(recipe_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pydantic.py").write_text("1 / 0\n")
    crashed = subprocess.run(
        command("gad", recipe_file),
        capture_output=True,
        text=True,
        env=environment(broken),
        check=False,
        timeout=120,
    )
    assert crashed.returncode == 1
    assert crashed.stderr.startswith("Traceback (most recent call last):")
    assert crashed.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def wait_for(condition: Path, process: subprocess.Popen[str], lines: int = 0) -> None:
    """Until a file exists and has so many lines."""
    until = time.monotonic() + 100
    while not condition.exists() or condition.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"waited for {condition}"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "moments"), [(signal.SIGINT, (0, 4)), (signal.SIGTERM, (4,))])
def test_a_run_that_is_stopped_says_how_to_go_on(
    recipe_file: Path, number: signal.Signals, moments: tuple[int, ...]
) -> None:
    folder = recipe_file.parent / "runs" / "tiny"
    endless = command("seqkd", recipe_file, "seqkd.max_steps=100000")
    # While torch is being loaded, or amid the steps.
    for rows in moments:
        with subprocess.Popen(
            endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process:
            wait_for(folder / "environment.json", process)
            if rows:
                wait_for(folder / "metrics.jsonl", process, rows)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert stdout == ""
        assert stderr.splitlines()[-1] == "stopped; run the same command to go on"
        assert "Traceback" not in stderr
