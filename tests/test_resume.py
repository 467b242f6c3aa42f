"""A run killed at any moment and started again ends as if nobody had: same weights, metrics and samples."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gadfly.checkpoint import checkpoint_steps, open_checkpoint, point
from gadfly.metrics import without_time
from gadfly.run_folder import RunFolder

SOURCE = Path(__file__).resolve().parents[1] / "src"
STAGES = ("seqkd", "warmup", "gad")
# Written by every command, whatever is left to do.
ALWAYS_WRITTEN = {"config.json", "environment.json", "report.html", ".lock"}

RECIPE = """
name = "tiny"
[data]
train = "{data}"
valid_share = 0.2
test = {{ same = "{data}" }}
[student]
model = "{model}"
max_grad_norm = 1.0
[discriminator]
learning_rate = 1e-3
[sampling]
max_response_tokens = 12
[seqkd]
learning_rate = 1e-3
batch_prompts = 8
max_steps = 3
save_every = 2
evaluate_every = 3
[warmup]
learning_rate = 1e-3
batch_prompts = 8
group_size = 2
max_steps = 3
discriminator_only_steps = 1
discriminator_final_steps = 1
save_every = 2
evaluate_every = 4
[gad]
learning_rate = 1e-3
batch_prompts = 4
group_size = 4
max_steps = 8
save_every = 2
evaluate_every = 3
[audit]
allow = ["leak-into-test"]  # its test set is its training set
[evaluation]
prompts = 4
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, teacher_file: Path) -> Path:
    """A recipe of all stages that ends in seconds."""
    path = tmp_path_factory.mktemp("resume") / "recipe.toml"
    path.write_text(RECIPE.format(data=teacher_file, model=tiny_model), encoding="utf-8")
    return path


def start(stage: str, recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gadfly", stage, str(recipe), f"run_folder={run}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )


def finish(stage: str, recipe: Path, run: Path, *overrides: str) -> str:
    """Run to the end; what was said."""
    process = start(stage, recipe, run, *overrides)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    return stderr


def refuse(stage: str, recipe: Path, run: Path, *overrides: str) -> str:
    """The line that a command is refused with."""
    process = start(stage, recipe, run, *overrides)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 2, stderr
    return stderr.splitlines()[-1]


def kill_when(moment: Callable[[], bool], process: subprocess.Popen[str], delay: float = 0.0) -> bool:
    """Kill a process at a moment; false if it ended before."""
    while not moment():
        if process.poll() is not None:
            _, stderr = process.communicate()
            assert process.returncode == 0, stderr
            return False
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return True


def rows_written(run: Path) -> int:
    """How far a run has come."""
    files = (run / "metrics.jsonl", run / "generations" / "same.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def tensors(folder: Path) -> dict[str, str]:
    """Every tensor under a folder, by file and name, hashed."""
    return {
        f"{file.relative_to(folder)}:{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def outcome(run: Path, stages: tuple[str, ...] = STAGES) -> dict[str, Any]:
    """What must not depend on how often a run was killed."""
    folder = RunFolder(run)
    found: dict[str, Any] = {
        name: [without_time(row) for row in folder.rows(f"{name}.jsonl") if row["stage"] in stages]
        for name in ("metrics", "samples")
    }
    for stage in stages:
        steps = checkpoint_steps(run / stage)
        last = open_checkpoint(run / stage / f"step-{steps[-1]:06d}")
        found[stage] = {
            "kept": steps,
            "latest": os.readlink(run / stage / "latest"),
            "digest": last.digest,
            "best": last.facts["best"],
            "tensors": tensors(last.path),
        }
    return found


def generations(run: Path) -> bytes:
    return (run / "generations" / "same.jsonl").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ALWAYS_WRITTEN)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def undisturbed(recipe: Path) -> Path:
    """The run folder of a run that nobody killed."""
    run = recipe.parent / "undisturbed"
    finish("run", recipe, run)
    return run


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    run = tmp_path / "copied"
    shutil.copytree(undisturbed, run, symlinks=True)
    return run


def kill_and_go_on(recipe: Path, run: Path, undisturbed: Path, kills: int, seed: int) -> None:
    """Kill a run at random moments, every other time amid a save, until it has been killed so often."""
    moments = random.Random(seed)
    killed = 0
    while killed < kills:
        process = start("run", recipe, run)
        delay = moments.uniform(0, 0.04)
        if killed % 2:
            killed += kill_when(lambda: any(run.glob("*/.step-*.tmp")), process, delay)
        else:
            at = moments.randint(rows_written(run), rows_written(undisturbed) - 1)
            killed += kill_when(lambda at=at: rows_written(run) > at, process, delay)
        if rows_written(run) >= rows_written(undisturbed):
            shutil.rmtree(run)


def test_a_run_killed_three_times_ends_as_one_that_was_not(recipe: Path, undisturbed: Path) -> None:
    run = recipe.parent / "killed"
    kill_and_go_on(recipe, run, undisturbed, kills=3, seed=1)
    finish("run", recipe, run)
    assert outcome(run) == outcome(undisturbed)
    assert generations(run) == generations(undisturbed)
    assert (
        RunFolder(run).read_json("summary.json")["evaluation"]
        == (RunFolder(undisturbed).read_json("summary.json")["evaluation"])
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(
    recipe: Path, undisturbed: Path, seed: int
) -> None:
    run = recipe.parent / f"killed-{seed}"
    kill_and_go_on(recipe, run, undisturbed, kills=4, seed=100 + seed)
    finish("run", recipe, run)
    assert outcome(run) == outcome(undisturbed)
    assert generations(run) == generations(undisturbed)


def test_a_finished_run_says_so_and_changes_nothing(recipe: Path, undisturbed: Path, copied: Path) -> None:
    before = contents(copied)
    output = finish("run", recipe, copied)
    for stage in STAGES:
        assert f"{stage}: done already, " in output
    assert contents(copied) == before


def test_changed_settings_of_a_finished_stage_are_named(recipe: Path, copied: Path) -> None:
    before = contents(copied)
    line = refuse("gad", recipe, copied, "gad.group_size=2", "student.weight_decay=0.5")
    assert line == (
        f"{copied / 'gad'}: finished with other settings: "
        f"gad.group_size = 4, now 2; student.weight_decay = 0.01, now 0.5. "
        f"Put them back, choose another name, or delete that folder to do the stage again."
    )
    assert contents(copied) == before


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(
    recipe: Path, undisturbed: Path, copied: Path
) -> None:
    shutil.rmtree(copied / "gad")
    latest = copied / "gad" / "step-000004"
    assert kill_when(latest.exists, start("gad", recipe, copied))
    latest = copied / "gad" / f"step-{checkpoint_steps(copied / 'gad')[-1]:06d}"
    weights = latest / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    before = contents(copied)
    line = refuse("gad", recipe, copied)
    assert line.startswith(f"{weights}: altered since it was saved; restore it, or delete {latest} to go on")
    assert contents(copied) == before
    shutil.rmtree(latest)
    assert "gad: going on after step " in finish("gad", recipe, copied)
    assert outcome(copied) == outcome(undisturbed)


def test_a_kill_right_after_the_last_save_leaves_no_trace(
    recipe: Path, undisturbed: Path, copied: Path
) -> None:
    # Neither links were moved, nor older checkpoints deleted, nor the stage marked as done.
    gad = copied / "gad"
    stage = RunFolder(copied).read_json("gad/stage.json")
    RunFolder(copied).write_json("gad/stage.json", {"settings": stage["settings"], "done": False})
    shutil.copytree(gad / "step-000008", gad / "step-000002")
    for link in ("latest", "best"):
        point(gad / link, gad / "step-000002")
    finish("gad", recipe, copied)
    assert outcome(copied) == outcome(undisturbed)
    assert os.readlink(gad / "best") == os.readlink(undisturbed / "gad" / "best")


def test_gad_goes_back_to_a_step_of_its_own(recipe: Path, undisturbed: Path, copied: Path) -> None:
    step = checkpoint_steps(copied / "gad")[0]
    changed = refuse("gad", recipe, copied, f"gad.start_from={step}", "gad.group_size=2")
    assert "other settings: gad.group_size = 4, now 2." in changed
    unknown = refuse("gad", recipe, copied, "gad.start_from=5")
    assert unknown.startswith("gad.start_from = 5: no such checkpoint in ")
    assert outcome(copied) == outcome(undisturbed), "a refusal deletes nothing"
    output = finish("gad", recipe, copied, f"gad.start_from={step}")
    assert f"gad: going on after step {step} of 8" in output
    assert outcome(copied) == outcome(undisturbed)


def test_gad_starts_from_a_checkpoint_elsewhere(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere"
    finish("gad", recipe, run, f"gad.start_from={undisturbed / 'warmup' / 'latest'}")
    assert outcome(run, ("gad",)) == outcome(undisturbed, ("gad",))
    # Gone on with or gone back in, it need not be told again where it began.
    finish("gad", recipe, run)
    step = checkpoint_steps(run / "gad")[0]
    assert f"gad: going on after step {step} of 8" in finish("gad", recipe, run, f"gad.start_from={step}")
    assert outcome(run, ("gad",)) == outcome(undisturbed, ("gad",))
    finish("gad", recipe, run, "gad.start_from=0")
    assert outcome(run, ("gad",)) == outcome(undisturbed, ("gad",)), "nor when there is no checkpoint left"
