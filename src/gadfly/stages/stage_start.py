"""What is said as a training stage begins or goes on."""

import logging
from collections.abc import Iterable

from gadfly.alarms import FEW_PROMPTS, silent
from gadfly.config import Training

logger = logging.getLogger(__name__)

# A tenth of the paper's 1,500 steps at 1e-6.
_SHORT_WAY = 1.5e-4


def tell_begun(stage: str, total_steps: int, training: Training, held_out: int) -> None:
    """Say what a stage cannot do with its settings, while it costs nothing yet to change them.

    Args:
        stage: its name.
        total_steps: steps in all.
        training: its section of the recipe.
        held_out: prompts of each evaluation.
    """
    # AdamW moves a weight by about its learning rate at a step, and no further.
    way = total_steps * training.learning_rate
    if way < _SHORT_WAY:
        logger.warning(
            "%s: %d steps at a learning rate of %g move a weight by %.1g at most, which teaches little (the "
            "paper's: 1.5e-3); raise its learning_rate, or lower its batch_prompts for more steps",
            *(stage, total_steps, training.learning_rate, way),
        )
    if quiet := silent(stage, held_out):
        logger.info(
            "%s: %d held-out prompts an evaluation; below %d these alarms stay silent: %s "
            "(evaluation.prompts)",
            *(stage, held_out, FEW_PROMPTS, ", ".join(quiet)),
        )


def tell_resumed(stage: str, step: int, total_steps: int, changes: Iterable[str]) -> None:
    """Say after which step a stage goes on, and in what its software is no longer what it began with."""
    logger.info("%s: going on after step %d of %d", stage, step, total_steps)
    if changed := "; ".join(changes):
        logger.warning("%s: begun with other software (%s); its numbers may differ", stage, changed)
