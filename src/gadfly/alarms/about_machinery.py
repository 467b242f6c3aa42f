"""Detectors of machinery that does not do its work: weights that stay, samplers that lag, no numbers."""

import math

from gadfly.alarms.alarm import Finding
from gadfly.alarms.bands import mean_band
from gadfly.alarms.history import History, Series

_ROLES = {"student": "detail/learning_rate", "discriminator": "detail/discriminator_learning_rate"}
# Rates below this share of the stage's largest move weights by less than their rounding.
_IDLE = 0.01
# Some elements are so near 0, as in biases that begin there, that the smallest rate still moves them.
_NEARLY_ALL = 0.7


def nothing_moves(history: History) -> Finding | None:
    """Three steps running, hardly one of a role's trained tensors has changed."""
    for role in _ROLES:
        last = _stepped(history, role).last(3)
        if len(last) == 3 and min(last.values) > _NEARLY_ALL:
            return Finding(
                f"{min(last.values):.0%} or more of the trained tensors of the {role} did not change at each "
                f"of its last three steps",
                last.steps[0],
            )
    return None


def frozen_module(history: History) -> Finding | None:
    """Step after step a good part of a role's trained tensors stays as it is."""
    count = history.window // 2
    for role in _ROLES:
        last = _stepped(history, role).last(count)
        if len(last) == count and 0.1 < min(last.values) <= _NEARLY_ALL:
            return Finding(
                f"{min(last.values):.0%} or more of the trained tensors of the {role} did not change at each "
                f"of its last {count} steps",
                last.steps[0],
            )
    return None


def _stepped(history: History, role: str) -> Series:
    """The still share of late, at the steps whose learning rate was not as good as 0 by schedule."""
    still, rates = history[f"detail/still_fraction/{role}"].last(history.window), history[_ROLES[role]]
    idle = _IDLE * max(rates.values, default=0.0)
    late = rates.last(2 * history.window)
    resting = {step for step, rate in zip(late.steps, late.values, strict=True) if rate < idle}
    kept = [pair for pair in zip(still.steps, still.values, strict=True) if pair[0] not in resting]
    return Series([step for step, _ in kept], [value for _, value in kept])


def sampler_gap(history: History) -> Finding | None:
    """Sampler and trainer give the same tokens different log-probabilities, beyond rounding."""
    bound = 0.1 if history.circumstances.is_half else 1e-3
    last = history["detail/sampler_gap_nats"].last(5)
    if len(last) >= 3 and (band := mean_band(last.values)).value > bound and min(last.values) > bound:
        return Finding(
            f"log-probabilities of the same tokens differ by {band.value:.2g} nats over {len(last)} steps, "
            f"more than the {bound:g} of rounding",
            last.steps[0],
        )
    return None


def not_finite(history: History) -> Finding | None:
    """A metric that is no finite number."""
    bad = [
        f"{name} is {value}"
        for name, value in history.newest.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return Finding(f"{', '.join(bad)} at step {history.step}", history.step) if bad else None
