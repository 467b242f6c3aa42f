"""Going back to before an alarm, and on with its remedy.

What was decided stands in STAGE/remedies.jsonl, a row each time the stage went back: first noted, then done.
So a kill in between is made up for at the next start, which is how a stage is reopened anyway.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Any

from gadfly.alarms import Alarm
from gadfly.alarms.advice import RATES
from gadfly.checkpoint import checkpoint_steps, drop_checkpoints_after, latest_checkpoint
from gadfly.config import Recipe
from gadfly.run_folder import Record, RunFolder
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)

# Times that a stage may go back; after that the alarm stops it.
_MOST_TIMES = 3

# What a key that the recipe leaves open stands for.
_STANDS_FOR = {
    "gad.discriminator_learning_rate": "discriminator.learning_rate",
    "warmup.discriminator_learning_rate": "discriminator.learning_rate",
    "seqkd.equal_time_learning_rate": "seqkd.learning_rate",
}


class GoBack(Exception):
    """Leaves a stage that has just noted to go back."""


@dataclass
class RemediedRun(Run):
    """A run whose recipe remedies have changed; its stages are still those of the recipe as written."""

    as_written: Run | None = None
    stage: str = ""
    """Whose remedies they are: a stage inside it, as the language model's in warmup, has its own."""

    def stage_settings(self, *sections: str) -> dict[str, Any]:
        """What the recipe as written says: the remedies follow from it."""
        assert self.as_written is not None, "always given"
        return self.as_written.stage_settings(*sections)


def reopened(stage: str) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """For the function of a stage: apply the remedies noted, and open the stage again when it goes back."""

    def decorate(work: Callable[[Run], None]) -> Callable[[Run], None]:
        @wraps(work)
        def working(run: Run) -> None:
            while True:
                try:
                    return work(_remedied(run, stage))
                except GoBack:
                    pass
                finally:
                    # The models that were open are many, and refer to each other.
                    gc.collect()

        return working

    return decorate


def begin_stage(run: Run, stage: str, settings: Record) -> bool:
    """`RunFolder.begin` for a stage that is reopened.

    Raises:
        GoBack: the stage begins anew with other settings, so that remedies for the old ones are gone.
    """
    left = run.folder.begin(stage, settings)
    if isinstance(run, RemediedRun) and run.stage == stage and not run.folder.rows(f"{stage}/remedies.jsonl"):
        raise GoBack
    return left


def remedy_for(run: Run, stage: str, alarm: Alarm) -> dict[str, float]:
    """The changed values by dotted key of the recipe; empty where an alarm has no remedy or none is left.

    Settings that the stage does not read are left out: with them alone it would do the same again.
    """
    if not alarm.remedy or len(run.folder.rows(f"{stage}/remedies.jsonl")) >= _MOST_TIMES:
        return {}
    changes = {}
    for key, change in alarm.remedy.items():
        key = RATES.get(key, key)
        if key.startswith("gad.") and stage != "gad":
            continue
        before = _value(run.recipe, key)
        if before is not None and change.of(before) != before:
            changes[key] = change.of(before)
    return changes


def note_remedy(run: Run, stage: str, alarm: Alarm, changes: Mapping[str, float], seconds: float) -> int:
    """Note that a stage goes back, and to which step: the newest checkpoint from before the fault, or 0.

    `seconds` is what the stage has taken up to now.
    """

    def note() -> int:
        own = run.alone().folder
        good = [step for step in checkpoint_steps(own.stage(stage)) if step < alarm.since]
        record = {key: value for key, value in asdict(alarm).items() if key not in ("remedy", "title")}
        row = {"stage": stage, **record, "back_to": max(good, default=0), "changes": dict(changes)}
        row["time/seconds"] = round(seconds, 3)
        own.append_rows(f"{stage}/remedies.jsonl", [{**row, "is_done": False}])
        return max(good, default=0)

    return run.processes.once("the way back", note)


def forget_remedies_after(folder: RunFolder, stage: str, step: int) -> None:
    """Of a stage taken back by hand, drop what it went back for later on; all of it if it begins anew."""
    rows = folder.rows(f"{stage}/remedies.jsonl")
    # In the order of time: a checkpoint has all that came before the last way back to it, or to before it.
    of_step = [number for number, row in enumerate(rows, start=1) if 0 < step >= row["back_to"]]
    if rows:
        folder.write_rows(f"{stage}/remedies.jsonl", rows[: max(of_step, default=0)])


def taken_back(run: Run, stage: str) -> dict[str, float]:
    """The `lost_seconds` of a stage, wall time of what it took back; nothing where it took back nothing."""
    lost = sum(row.get("time/lost_seconds", 0.0) for row in run.folder.rows(f"{stage}/remedies.jsonl"))
    return {"lost_seconds": round(float(lost), 3)} if lost else {}


def _remedied(run: Run, stage: str) -> Run:
    """The run with all remedies of a stage, which has gone back as far as the last one says."""
    rows = run.folder.rows(f"{stage}/remedies.jsonl")
    if not rows:
        return run
    last = rows[-1]
    if not last["is_done"]:

        def go_back() -> None:
            drop_checkpoints_after(run.folder.stage(stage), last["back_to"])
            kept = latest_checkpoint(run.folder.stage(stage))
            at_checkpoint = kept.facts.get("seconds", 0.0) if kept else 0.0
            # Earlier versions noted no seconds.
            lost = {"time/lost_seconds": round(max(0.0, last.get("time/seconds", 0.0) - at_checkpoint), 3)}
            run.alone().folder.write_rows(
                f"{stage}/remedies.jsonl", [*rows[:-1], {**last, **lost, "is_done": True}]
            )

        run.processes.once("the way back", go_back, is_patient=True)
    recipe = run.recipe
    for row in rows:
        recipe = _changed(recipe, row["changes"])
    shown = ", ".join(f"{key} = {value:g}" for row in rows for key, value in row["changes"].items())
    logger.warning("%s: went back %d times for alarms; %s", stage, len(rows), shown)
    as_is = {field.name: getattr(run, field.name) for field in fields(Run)}
    remedied = RemediedRun(**{**as_is, "recipe": recipe}, as_written=run, stage=stage)
    # Read once: the data are the same.
    vars(remedied)["data"] = run.data
    return remedied


def _changed(recipe: Recipe, changes: Mapping[str, float]) -> Recipe:
    for key, value in changes.items():
        section, name = key.split(".")
        changed = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: changed})
    return recipe


def _value(recipe: Recipe, key: str) -> float | None:
    """A number of the recipe; None where it has no such setting, as SFT has no discriminator's rate."""
    section, name = key.split(".")
    value: float | None = getattr(getattr(recipe, section, None), name, None)
    return _value(recipe, _STANDS_FOR[key]) if value is None and key in _STANDS_FOR else value
