"""Every planted fault is found by its own name within its bound, and clean runs are left in peace."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.experiment import FOLDER
from experiments.faults.fault import Fault
from experiments.faults.plants import FAULTS
from experiments.faults.running import run_clean, run_fault, warmed_up

SEED = 0
# Found within a few steps, and whatever the student has learnt.
QUICK = {"random head on reload", "rate too small to move anything", "NaN gradient"}


def is_quick(fault: Fault) -> bool:
    return not fault.needs_start or fault.name in QUICK


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a clean warmup."""
    return warmed_up(tmp_path_factory.mktemp("start"), SEED)


@pytest.fixture(scope="module")
def hasty_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a few steps, which have taught nobody much."""
    settings = ("warmup.max_steps=4", "warmup.discriminator_final_steps=2")
    return warmed_up(tmp_path_factory.mktemp("hasty"), SEED, settings)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.name, marks=() if is_quick(f) else pytest.mark.slow) for f in FAULTS],
)
def test_a_fault_is_found_by_its_name_in_time_and_nothing_false_is_said_beside_it(
    fault: Fault, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fixture = "hasty_start" if is_quick(fault) else "start"
    start: Path | None = request.getfixturevalue(fixture) if fault.needs_start else None
    outcome = run_fault(fault, tmp_path / "ground", SEED, start)
    found = outcome.of(fault)
    assert found is not None, outcome.sights
    assert found.step <= fault.within
    assert outcome.false(fault) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_clean_run_raises_none(seed: int, tmp_path: Path) -> None:
    outcome = run_clean(tmp_path, seed)
    assert outcome.sights == ()
    assert outcome.steps == 80


@pytest.mark.slow
def test_the_command_prints_the_table() -> None:
    command = [sys.executable, "-m", "experiments.faults", "learning rate 0", "--clean", "0"]
    ended = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    *_, row = ended.stdout.splitlines()
    assert row == "| learning rate 0 | recipe | the check of the recipe | 0 | 0 | none | none |"
