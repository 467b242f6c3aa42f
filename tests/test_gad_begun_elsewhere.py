"""A gad that began from another run's checkpoint stays so, through kills at which none of its own is left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from test_roll_back_in_gad import DRIFTING, thrown_away

from gadfly.checkpoint import checkpoint_steps
from gadfly.recipe_file import load_recipe
from gadfly.run_folder import RunFolder
from gadfly.stages.gad import gad
from gadfly.stages.loop import TrainingLoop
from gadfly.stages.remedies import forget_remedies_after
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def elsewhere(recipe_file: Path, tmp_path: Path) -> Path:
    """The end of another run's warmup."""
    with open_run(load_recipe(recipe_file, [f"run_folder={tmp_path / 'before'}"])) as run:
        warmup(run)
    return (tmp_path / "before" / "warmup" / "latest").resolve()


def go_on(recipe: Path, run: Path, *settings: str, is_killed: Callable[[int], bool] | None = None) -> None:
    """Run gad; as if killed after the first step of which that is said."""
    log = TrainingLoop.log

    def logging(loop: TrainingLoop, metrics: dict[str, float]) -> None:
        log(loop, metrics)
        if is_killed is not None and is_killed(loop.step):
            raise Killed

    with (
        patch.object(TrainingLoop, "log", logging),
        open_run(load_recipe(recipe, [f"run_folder={run}", *settings])) as opened,
    ):
        if is_killed is None:
            gad(opened)
        else:
            with pytest.raises(Killed):
                gad(opened)


def stage(run: Path) -> dict[str, Any]:
    return RunFolder(run).read_json("gad/stage.json")


def test_it_begins_there_again_however_often_it_is_killed_on_the_way(
    recipe_file: Path, elsewhere: Path, tmp_path: Path
) -> None:
    run, own = tmp_path / "run", "warmup.max_steps=3"
    with open_run(load_recipe(recipe_file, [f"run_folder={run}", own])) as opened:
        warmup(opened)
    go_on(recipe_file, run, own, f"gad.start_from={elsewhere}")
    start = stage(run)["settings"]["start"]
    go_on(recipe_file, run, own, "gad.start_from=0", is_killed=lambda step: step == 1)
    # Each time without a checkpoint of its own, and now without a word of where it began.
    for _ in range(2):
        go_on(recipe_file, run, own, is_killed=lambda step: step == 1)
        assert not checkpoint_steps(run / "gad")
    go_on(recipe_file, run, own)
    assert stage(run)["done"]
    assert stage(run)["settings"]["start"] == start


def test_it_begins_there_again_with_other_settings_while_nothing_is_trained(
    recipe_file: Path, elsewhere: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", ("gad.learning_rate=3e-4", "gad.save_every=1")
    go_on(recipe_file, run, f"gad.start_from={elsewhere}")
    start = stage(run)["settings"]["start"]
    go_on(recipe_file, run, "gad.start_from=0", is_killed=lambda step: step == 1)
    go_on(recipe_file, run, *other, is_killed=lambda step: step == 3)
    go_on(recipe_file, run, *other)
    assert stage(run)["done"]
    assert stage(run)["settings"]["start"] == start


def test_remedies_for_settings_that_were_put_right_are_not_applied(
    recipe_file: Path, elsewhere: Path, tmp_path: Path
) -> None:
    run, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    # Of checkpoints there is none, so that it goes back to the start, and is killed there.
    settings = (f"gad.start_from={elsewhere}", *DRIFTING, "gad.save_every=100")
    with thrown_away():
        go_on(
            recipe_file,
            run,
            *settings,
            is_killed=lambda step: step == 2 and bool(folder.rows("gad/remedies.jsonl")),
        )
        assert folder.rows("gad/remedies.jsonl")[0]["changes"]["gad.learning_rate"] == 1e-4
        go_on(recipe_file, run, *settings, "gad.group_size=3", "gad.max_steps=3")
    assert not folder.rows("gad/remedies.jsonl")
    rates = [row["detail/learning_rate"] for row in folder.rows("metrics.jsonl") if "student/loss" in row]
    assert rates == [2e-4] * 3


@pytest.mark.parametrize(
    ("back_to", "step", "kept"),
    [
        # What is at step 4 was made after both.
        ([6, 3], 4, 2),
        ([6, 3], 3, 2),
        ([3, 6], 4, 1),
        ([3, 6], 2, 0),
        ([6, 3], 0, 0),
    ],
)
def test_a_checkpoint_keeps_the_remedies_it_was_made_with(
    back_to: list[int], step: int, kept: int, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    alarm = {
        "stage": "gad",
        "step": 9,
        "since": 9,
        "name": "drift",
        "evidence": "",
        "cause": "",
        "advice": "",
    }
    rows = [{**alarm, "back_to": one, "changes": {}, "is_done": True} for one in back_to]
    folder.write_rows("gad/remedies.jsonl", rows)
    forget_remedies_after(folder, "gad", step)
    assert folder.rows("gad/remedies.jsonl") == rows[:kept]
