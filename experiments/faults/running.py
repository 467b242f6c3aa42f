"""Runs the ground, clean or with a fault in it, through the product's own stages."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from experiments.faults.fault import Fault, Outcome, Sight
from experiments.faults.ground import prepare
from gadfly.config import Recipe
from gadfly.errors import AlarmError, CheckpointError, ConfigError
from gadfly.recipe_file import load_recipe
from gadfly.stages.audit import audit, audit_warmup
from gadfly.stages.gad import gad
from gadfly.stages.run import Run, open_run
from gadfly.stages.warmup import warmup

UNTRAINED = {"student-runs-on", "told-by-surface"}
"""What the audit says of any student that knows nothing yet."""


def run_clean(folder: Path, seed: int) -> Outcome:
    """Audit, warmup, audit and gad of a ground in which nothing is planted."""
    recipe = _recipe(prepare(folder, seed), folder / "runs" / "clean")
    return _through(recipe, audit, warmup, audit_warmup, gad)


def warmed_up(folder: Path, seed: int, settings: tuple[str, ...] = ()) -> Path:
    """The checkpoint of a clean run's warmup, which faults of gad start from."""
    where = folder / "runs" / "clean"
    with open_run(_recipe(prepare(folder, seed), where, *settings)) as run:
        warmup(run)
    return where / "warmup" / "latest"


def run_fault(fault: Fault, folder: Path, seed: int, start: Path | None) -> Outcome:
    """Plant a fault into a fresh ground and run what shows it, until what is to find it does.

    Args:
        fault: which.
        folder: of the ground; what was there is replaced.
        seed: of data and models; that of `start`.
        start: a clean warmup's checkpoint; not needed for what is found before the training.
    """
    shutil.rmtree(folder, ignore_errors=True)
    file = prepare(folder, seed)
    if start is not None and fault.needs_start:
        shutil.copytree(start.resolve(), folder / "start")
    fault.plant(folder)
    settings = [setting.format(folder=folder) for setting in fault.settings]
    if fault.by == "alarm" and fault.finds != "not-finite":
        settings.append(f"alarms.actions.{fault.finds}=stop")
    if fault.stage == "gad":
        settings.append(f'gad.start_from="{folder}/start"')
    try:
        recipe = _recipe(file, folder / "runs" / "planted", *settings)
    except ConfigError as refused:
        return Outcome((Sight("config", str(refused), "", 0, str(refused)),), 0, 0.0)
    stages = {"warmup": warmup, "gad": gad}
    with fault.around():
        return _through(recipe, audit if fault.by == "audit" else stages[fault.stage])


def _recipe(file: Path, where: Path, *settings: str) -> Recipe:
    return load_recipe(file, [f'run_folder="{where}"', *settings])


def _through(recipe: Recipe, *stages: Callable[[Run], None]) -> Outcome:
    """Run stages in their order until one refuses to go on, and gather what was found."""
    began = time.perf_counter()
    refused: list[Sight] = []
    with open_run(recipe) as run:
        try:
            for stage in stages:
                stage(run)
        except CheckpointError as error:
            refused = [Sight("load", str(error), "", 0, str(error))]
        except AlarmError:
            # That of an alarm or of a finding, which are written down.
            pass
        sights = [*refused, *_findings(run), *_alarms(run)]
        steps = sum("discriminator/accuracy" in row for row in run.folder.rows("metrics.jsonl"))
    return Outcome(tuple(sights), steps, time.perf_counter() - began)


def _findings(run: Run) -> list[Sight]:
    return [
        Sight("audit", found["name"], stage, 0, found["evidence"], is_mechanical=found["mechanical"])
        for stage, looked in run.folder.read_json("audit.json").items()
        for found in looked["findings"]
        if found["name"] not in UNTRAINED or looked["trained"]
    ]


def _alarms(run: Run) -> list[Sight]:
    return [
        Sight("alarm", row["name"], row["stage"], row["step"], row["evidence"])
        for row in run.folder.rows("alarms.jsonl")
    ]
