"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

import math

from gadfly.config import Schedule


def scheduled_learning_rate(learning_rate: float, schedule: Schedule, step: int, total_steps: int) -> float:
    """Learning rate of a step; `step` counts from 1.

    `cosine` starts at `learning_rate` and would reach zero one step after the last.

    Example:
        >>> scheduled_learning_rate(1.0, "cosine", 6, 10)
        0.5
    """
    if schedule == "constant":
        return learning_rate
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
