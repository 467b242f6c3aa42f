"""Histories of a stage as a healthy run logs them, and with a fault planted into some of their metrics."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from gadfly.alarms import Circumstances, History, look

Row = dict[str, Any]
Shape = Callable[[int], float | None]
"""A metric at a step, before noise; None where a row does not have it."""

CIRCUMSTANCES = Circumstances(window=20, group_size=8, held_out=64)
EVERY = 20


def _rising(before: float, after: float, over: float) -> Shape:
    return lambda step: after + (before - after) * math.exp(-step / over)


# What a healthy gad stage logs, each with the noise of a step around it.
HEALTHY: dict[str, tuple[Shape, float]] = {
    "discriminator/accuracy": (_rising(0.92, 0.78, 60), 0.04),
    "discriminator/score_gap": (_rising(4.0, 2.0, 60), 0.3),
    "discriminator/loss": (_rising(0.2, 0.45, 60), 0.04),
    "discriminator/grad_norm": (_rising(0.5, 1.0, 40), 0.2),
    "student/loss": (lambda step: 0.01, 0.02),
    "student/grad_norm": (lambda step: 0.15, 0.03),
    "student/kl_nats": (lambda step: 0.25 * (1 - math.exp(-step / 50)), 0.01),
    "student/entropy_nats": (_rising(0.6, 0.4, 60), 0.03),
    "group/score_std": (lambda step: 1.2, 0.2),
    "group/zero_variance_fraction": (lambda step: 0.02, 0.02),
    "group/distinct_fraction": (lambda step: 0.93, 0.03),
    "rollout/response_tokens": (lambda step: 60.0, 4.0),
    "rollout/length_ratio": (lambda step: 1.05, 0.08),
    "rollout/finished_fraction": (lambda step: 0.95, 0.04),
    "detail/teacher_finished_fraction": (lambda step: 0.98, 0.02),
    "detail/sampler_gap_nats": (lambda step: 1e-6, 1e-7),
    "detail/learning_rate": (lambda step: 1e-6, 0.0),
    "detail/discriminator_learning_rate": (lambda step: 1e-6, 0.0),
    "detail/score_rms": (_rising(2.0, 4.0, 80), 0.3),
    "detail/tied_fraction": (lambda step: 0.0, 0.0),
    "detail/length_score_correlation": (lambda step: -0.1, 0.2),
    "detail/length_matched_accuracy": (_rising(0.9, 0.76, 60), 0.08),
    "detail/still_fraction/student": (lambda step: 0.0, 0.0),
    "detail/still_fraction/discriminator": (lambda step: 0.03, 0.0),
    "detail/reward_share/discriminator": (lambda step: 0.7, 0.05),
    "detail/reward_share/format": (lambda step: 0.3, 0.05),
}
HELD_OUT: dict[str, tuple[Shape, float]] = {
    "evaluation/rouge_l": (_rising(0.30, 0.36, 60), 0.01),
    "evaluation/repetition": (lambda step: 0.05, 0.02),
    "evaluation/finished_fraction": (lambda step: 0.95, 0.02),
    "evaluation/tell_accuracy": (_rising(0.85, 0.75, 80), 0.045),
    "probe/accuracy": (_rising(0.90, 0.76, 60), 0.04),
    "detail/held_out_accuracy": (_rising(0.90, 0.76, 60), 0.04),
    "detail/surface_accuracy": (lambda step: 0.62, 0.04),
    "detail/perturbation_share": (lambda step: 0.15, 0.05),
    "detail/snapshot_gap/warmup": (_rising(4.0, 2.0, 80), 0.2),
}
# Shares of steps cannot leave [0, 1].
_SHARES = ("accuracy", "_fraction", "share", "repetition")


def rows(
    steps: int, *, seed: int = 0, stage: str = "gad", planted: dict[str, Shape] | None = None
) -> Iterator[Row]:
    """Steps and evaluations in the order a stage logs them; what is planted has less noise."""
    rng = random.Random(seed)
    shapes = {name: shape for name, (shape, _) in (HEALTHY | HELD_OUT).items()} | (planted or {})
    noises = {name: noise for name, (_, noise) in (HEALTHY | HELD_OUT).items()}

    def logged(step: int, names: set[str]) -> Row:
        row: Row = {"stage": stage, "step": step}
        for name in sorted(names):
            value = shapes[name](step)
            if value is None:
                continue
            noise = noises.get(name, 0.0)
            if name in (planted or {}):
                noise = min(0.2 * noise, 0.1 * abs(value))
            value += rng.gauss(0.0, noise) if noise else 0.0
            row[name] = min(max(value, 0.0), 1.0) if name.endswith(_SHARES) else value
        return row

    held_out = {name for name in shapes if name in HELD_OUT or name.startswith("detail/snapshot_gap/")}
    yield logged(0, held_out)
    for step in range(1, steps + 1):
        yield logged(step, shapes.keys() - held_out)
        if step % EVERY == 0 or step == steps:
            yield logged(step, held_out)


def raised(logged: Iterator[Row], circumstances: Circumstances = CIRCUMSTANCES) -> dict[str, int]:
    """Every alarm that the rows raise, with the first step it is raised at."""
    history: History | None = None
    found: dict[str, int] = {}
    for row in logged:
        history = history or History(row["stage"], circumstances)
        history.add(row)
        for alarm in look(history):
            found.setdefault(alarm.name, alarm.step)
    return found
