"""A stage of made-up numbers for the tests of alarms: it drifts away until a remedy holds it.

Loop, checkpoints, rows and alarms are the real ones; only the models are a number in a file. As a program it
is given a recipe and the settings of the run.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from gadfly.checkpoint import latest_checkpoint
from gadfly.errors import AlarmError
from gadfly.recipe_file import load_recipe
from gadfly.stages.loop import training_loop
from gadfly.stages.remedies import reopened
from gadfly.stages.run import Run, open_run

STEPS, ONSET = 60, 20


@reopened("gad")
def drifting(run: Run) -> None:
    """KL grows from step 20 on, unless gad.kl_coefficient is 0.01 or more."""
    _stage(run, lambda step: None)


@reopened("gad")
def breaking(run: Run) -> None:
    """At step 33 the loss is no number, unless gad.learning_rate is below 1e-3."""

    def check(step: int) -> None:
        if step == 33 and run.recipe.gad.learning_rate >= 1e-3:
            raise AlarmError("the loss is nan (prompts p1); nothing was updated")

    _stage(run, check)


def _stage(run: Run, check: Callable[[int], None]) -> None:
    if not run.folder.begin("gad", run.stage_settings("gad")):
        return
    resumed = latest_checkpoint(run.folder.stage("gad"))
    kl = float((resumed.path / "student" / "kl.txt").read_text()) if resumed else 0.0

    def snapshot(_: bool) -> Callable[[Path], None]:
        text = repr(kl)

        def write(folder: Path) -> None:
            (folder / "student").mkdir()
            (folder / "student" / "kl.txt").write_text(text)

        return write

    with training_loop(
        run,
        "gad",
        total_steps=STEPS,
        training=run.recipe.gad,
        engines={},
        snapshot=snapshot,
        evaluate=None,
        resumed_from=resumed,
    ) as loop:
        for step in loop:
            check(step)
            drifts = step > ONSET and run.recipe.gad.kl_coefficient < 0.01
            kl = kl + 0.1 if drifts else 0.9 * kl + 0.01
            accuracy = 0.999 if 25 <= step < 45 else 0.8
            loop.log(
                {
                    "student/kl_nats": kl,
                    "discriminator/accuracy": accuracy,
                    "discriminator/score_gap": 4.0,
                    "group/score_std": 0.1,
                    "detail/discriminator_skipped": float(loop.discriminator_rests),
                }
            )


def main() -> None:
    """Run the drifting stage."""
    with open_run(load_recipe(Path(sys.argv[1]), sys.argv[2:])) as run:
        drifting(run)


if __name__ == "__main__":
    main()
