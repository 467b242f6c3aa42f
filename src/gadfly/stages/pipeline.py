"""Every stage in its order, each skipped when it is done."""

import logging
from collections.abc import Callable

from gadfly.dataset import load_rows
from gadfly.stages.gad import gad
from gadfly.stages.generate import generate
from gadfly.stages.report import report
from gadfly.stages.run import Run
from gadfly.stages.sft import seqkd, seqkd_equal_time
from gadfly.stages.warmup import warmup

logger = logging.getLogger(__name__)

STAGES: dict[str, Callable[[Run], None]] = {
    "seqkd": seqkd,
    "warmup": warmup,
    "gad": gad,
    "seqkd-equal-time": seqkd_equal_time,
    "generate": generate,
    "report": report,
}


def run_stages(run: Run) -> None:
    """Run every stage that the recipe configures and that is not done yet; resumable at any moment."""
    for files in run.recipe.data.test.values():
        # A test set that cannot be read is better known before the training than after it.
        load_rows(files, needs_response=False)
    for name, stage in STAGES.items():
        if name == "seqkd-equal-time" and not run.recipe.seqkd.equal_time:
            continue
        if name == "generate" and not run.recipe.data.test:
            logger.info("generate: skipped, the recipe has no data.test")
            continue
        stage(run)
