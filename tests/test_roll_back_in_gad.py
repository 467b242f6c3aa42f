"""Going back in gad: a real run drifts away, is taken up again from before that, and ends with the remedy."""

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from gadfly.checkpoint import checkpoint_steps
from gadfly.engine import scheduled_learning_rate
from gadfly.metrics import without_time
from gadfly.recipe_file import load_recipe
from gadfly.run_folder import RunFolder
from gadfly.stages.gad import gad
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup

TESTS = Path(__file__).resolve().parent
SOURCES = TESTS.parent / "src"
STEPS, THROWN_AT = 13, 4
# A whole window of steps, half of which stand for a drift.
DRIFTING = (
    "gad.learning_rate=2e-4",
    "gad.kl_coefficient=0.03",
    f"gad.max_steps={STEPS}",
    "gad.evaluate_every=100",
    "gad.save_every=1",
    "gad.replay=2",
    "checkpoints.keep_last=20",
    "alarms.window=16",
    "alarms.actions.drift=roll_back",
)

# Two of the checkpoints of the drift are gone when the process is killed.
KILLED_ON_THE_WAY_BACK = """
import os, shutil, signal, sys
from pathlib import Path
from test_roll_back_in_gad import thrown_away
from gadfly.recipe_file import load_recipe
from gadfly.stages.gad import gad
from gadfly.stages.run import open_run

delete, deleted = shutil.rmtree, []

def deleting(path, *rest, **named):
    delete(path, *rest, **named)
    if (Path(path).parent / "remedies.jsonl").exists():
        deleted.append(path)
    if len(deleted) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

shutil.rmtree = deleting
with thrown_away(), open_run(load_recipe(Path(sys.argv[1]), sys.argv[2:])) as run:
    gad(run)
"""


def thrown_away() -> AbstractContextManager[object]:
    """A step at the recipe's rate throws the student nats away, on any machine; at half that none does."""

    def rate_of(rate: float, schedule: str, step: int, total: int) -> float:
        is_thrown = step == THROWN_AT and rate == 2e-4
        return 0.5 if is_thrown else scheduled_learning_rate(rate, schedule, step, total)

    return patch("gadfly.stages.gad.scheduled_learning_rate", rate_of)


def settings(folder: Path, *more: str) -> list[str]:
    return [f"run_folder={folder / 'run'}", f"gad.start_from={folder.parent / 'start'}", *DRIFTING, *more]


def run_gad(recipe: Path, folder: Path, *more: str) -> Path:
    with thrown_away(), open_run(load_recipe(recipe, settings(folder, *more))) as run:
        gad(run)
    return folder / "run"


def kept(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of every checkpoint of gad, by file."""
    files = sorted((run / "gad").glob("step-*/**/*.safetensors"))
    return {str(file.relative_to(run)): load_file(file) for file in files}


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on how often a run was stopped."""
    folder = RunFolder(run)
    return {
        "metrics": [without_time(row) for row in folder.rows("metrics.jsonl")],
        "samples": folder.rows("samples.jsonl"),
        "alarms": folder.rows("alarms.jsonl"),
        "remedies": [without_time(row) for row in folder.rows("gad/remedies.jsonl")],
        "kept": checkpoint_steps(run / "gad"),
        "replay": [file.read_text() for file in sorted((run / "gad").glob("step-*/trainer/replay.jsonl"))],
        "stage": {**folder.read_json("gad/stage.json"), "seconds": None, "lost_seconds": None},
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def ground(recipe_file: Path, tmp_path: Path) -> Path:
    """Where runs of gad lie beside the checkpoint they start from."""
    with open_run(load_recipe(recipe_file, [f"run_folder={tmp_path / 'before'}"])) as run:
        warmup(run)
    (tmp_path / "start").symlink_to((tmp_path / "before" / "warmup" / "latest").resolve())
    return tmp_path


def test_gad_goes_back_to_the_newest_checkpoint_before_the_fault_and_a_kill_on_the_way_changes_no_tensor(
    recipe_file: Path, ground: Path
) -> None:
    undisturbed = run_gad(recipe_file, ground / "undisturbed")
    found = outcome(undisturbed)
    (remedy,) = found["remedies"]
    assert (remedy["name"], remedy["stage"], remedy["is_done"]) == ("drift", "gad", True)
    # Seen on the samples of half a window after it.
    assert (remedy["since"], remedy["step"]) == (THROWN_AT, THROWN_AT + 8)
    assert remedy["changes"] == {"gad.kl_coefficient": 0.3, "gad.learning_rate": 1e-4}
    # Saved at every step: no other is as new and without the fault.
    assert remedy["back_to"] == THROWN_AT - 1

    trained = [row for row in found["metrics"] if "student/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    rates = {row["step"]: row["detail/learning_rate"] for row in trained}
    assert {rates[step] for step in range(1, remedy["back_to"] + 1)} == {2e-4}
    assert {rates[step] for step in range(remedy["back_to"] + 1, STEPS + 1)} == {1e-4}
    assert not [row for row in found["alarms"] if row["name"] == "drift"]
    assert found["kept"] == list(range(1, STEPS + 1))
    assert found["stage"]["done"]
    assert found["stage"]["settings"]["gad"]["learning_rate"] == 2e-4, "the stage is that of the recipe"

    killed = ground / "killed"
    (ground / "program.py").write_text(KILLED_ON_THE_WAY_BACK, encoding="utf-8")
    command = [sys.executable, str(ground / "program.py"), str(recipe_file), *settings(killed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SOURCES), str(TESTS)))}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    left = outcome(killed / "run")
    assert not left["remedies"][0]["is_done"]
    assert remedy["back_to"] < max(left["kept"]) < remedy["step"] - 1, "it was amid the way back"
    (alarm,) = [row for row in left["alarms"] if row["name"] == "drift"]
    assert (alarm["action"], alarm["step"], alarm["since"]) == ("roll_back", remedy["step"], remedy["since"])
    drifted, mended = kept(killed / "run"), kept(undisturbed)
    assert {name for name in drifted if not same(drifted[name], mended[name])} >= {
        f"gad/step-{max(left['kept']):06d}/{role}/model.safetensors" for role in ("student", "discriminator")
    }

    run_gad(recipe_file, killed)
    assert outcome(killed / "run") == found
    again = kept(killed / "run")
    assert again.keys() == mended.keys()
    assert all(same(again[name], tensors) for name, tensors in mended.items())


def test_a_stage_taken_back_by_hand_forgets_what_it_went_back_for_later_on(
    recipe_file: Path, ground: Path
) -> None:
    folder = ground / "by-hand"
    before = outcome(run_gad(recipe_file, folder))
    (remedy,) = before["remedies"]

    def taken_back_to(step: int) -> dict[str, Any]:
        found = outcome(run_gad(recipe_file, folder, f"gad.start_from={step}"))
        # That it was taken back, and has been trained from there.
        del found["stage"]["went_back_to"], found["stage"]["has_trained"]
        return found

    # To where it went back itself, it goes on as it did: with the remedy.
    assert taken_back_to(remedy["back_to"]) == before
    assert RunFolder(folder / "run").rows("gad/remedies.jsonl")[0]["is_done"]
    # From before that, or the start, without it, and so it meets the same again.
    for step in (remedy["back_to"] - 1, 0):
        found = taken_back_to(step)
        assert found["remedies"] == before["remedies"]
        assert found["metrics"] == before["metrics"]
