"""Every stage in its order, each skipped when it is done or not configured."""

import functools
import logging
from collections.abc import Callable
from importlib import import_module

from gadfly.data.dataset import load_rows
from gadfly.errors import ConfigError
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)

STAGES = {
    "collect": "gadfly.stages.collect:collect",
    "audit": "gadfly.stages.audit:audit",
    "seqkd": "gadfly.stages.sft:seqkd",
    "warmup": "gadfly.stages.warmup:warmup",
    "audit-warmup": "gadfly.stages.audit:audit_warmup",
    "gad": "gadfly.stages.gad:gad",
    "best": "gadfly.stages.best:best",
    "seqkd-equal-time": "gadfly.stages.sft:seqkd_equal_time",
    "generate": "gadfly.stages.generate:generate",
    "judge": "gadfly.stages.judge:judge",
    "report": "gadfly.stages.report:report",
}
"""Module and function of every stage."""


_BY_THE_FIRST = ("collect", "audit", "audit-warmup", "best", "judge", "report")
"""Stages that one process does, however many there are."""


def stage(name: str) -> Callable[[Run], None]:
    """The function of a stage. Its module is loaded now: not every stage needs torch."""
    module, function = STAGES[name].split(":")
    found: Callable[[Run], None] = getattr(import_module(module), function)
    if name not in _BY_THE_FIRST:
        return found
    return lambda run: run.processes.once(name, lambda: found(run.alone()), is_patient=True)


def run_stages(run: Run) -> None:
    """Run every stage that the recipe configures and that is not done yet; resumable at any moment."""
    for files in run.recipe.data.test.values():
        # In each process: it may have other files.
        run.processes.together("test sets", functools.partial(load_rows, files, needs_response=False))
    run.processes.once("a look ahead", lambda: _look_ahead(run.alone()), is_patient=True)
    for name in STAGES:
        if reason := _not_configured(run, name):
            logger.info("%s: skipped, %s", name, reason)
        else:
            run.processes.place = name
            stage(name)(run)


def _look_ahead(run: Run) -> None:
    """Find before the training what would end the run after it."""
    last = "seqkd-equal-time" if run.recipe.seqkd.equal_time else "gad"
    if run.folder.is_done(last):
        return
    for name in ("generate", "judge"):
        import_module(f"gadfly.stages.{name}").check_recipe(run)
    for name in run.recipe.generate.checkpoints if run.recipe.data.test else ():
        is_there = (run.folder.path / name).exists()
        if not is_there and (reason := _not_configured(run, name.partition("/")[0])):
            raise ConfigError(f"generate.checkpoints: {name!r} will not be there, as {reason}; leave it out")


def _not_configured(run: Run, name: str) -> str:
    """Why a stage has nothing to do in this run; empty if it has."""
    recipe = run.recipe
    if name == "collect" and (recipe.data.prompts is None or recipe.teacher.model is None):
        return "the recipe has no data.prompts and teacher.model"
    if name == "collect" and recipe.data.train is not None:
        return "the recipe has data.train"
    if name in ("discriminator-lm", "warmup", "audit-warmup") and run.gad_begins_at is not None:
        return "gad.start_from names where gad begins"
    if name == "discriminator-lm" and recipe.discriminator.lm_steps == 0:
        return "discriminator.lm_steps is 0"
    if name == "seqkd-equal-time" and not recipe.seqkd.equal_time:
        return "seqkd.equal_time is false"
    if name == "best" and recipe.checkpoints.best_by == "rouge_l":
        return 'checkpoints.best_by is "rouge_l"'
    if name in ("generate", "judge") and not recipe.data.test:
        return "the recipe has no data.test"
    return ""
