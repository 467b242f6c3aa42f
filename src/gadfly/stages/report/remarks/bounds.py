"""Bounds of single metrics: outside them a remark is due.

Every one is a starting point from cases others have met, not a measured optimum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.remarks.remark import Remark
from gadfly.stages.report.wording import number


@dataclass(frozen=True)
class Bound:
    """A remark due where a metric's mean over the last quarter of GAD is not in [low, high)."""

    metric: str
    what: str
    evidence: str
    """With `{}` for the mean."""
    cause: str
    change: str
    low: float = -inf
    high: float = inf


BOUNDS = (
    Bound(
        "discriminator/accuracy",
        "The discriminator tells nearly every sample",
        "Accuracy on fresh pairs {}; 0.95 or more leaves the student little to climb.",
        "It reads a surface trait (length, layout, how answers end), or it learns much faster than "
        "the student.",
        "Compare samples and teacher below for such a trait; then lower "
        "gad.discriminator_learning_rate, or give the student a longer warmup.",
        high=0.95,
    ),
    Bound(
        "discriminator/accuracy",
        "The discriminator is fooled",
        "Accuracy on fresh pairs {}; below 0.5 it prefers the student's answers.",
        "The student found what it rewards by mistake, and it is too weak or too slow to follow.",
        "Raise gad.discriminator_learning_rate or gad.kl_coefficient, or warm it up longer "
        "(warmup.discriminator_only_steps, discriminator.lm_steps).",
        low=0.5,
    ),
    Bound(
        "group/zero_variance_fraction",
        "Most groups teach nothing",
        "All scores are equal in a share of {} of the groups.",
        "The samples of a group are copies of each other, or the discriminator sees no difference "
        "between them.",
        "Raise sampling.temperature or gad.group_size; if the samples do differ, the discriminator "
        "needs a longer warmup.",
        high=0.5,
    ),
    Bound(
        "rollout/length_ratio",
        "The samples are much shorter than the teacher's answers",
        "Length ratio {}; 0.7 to 1.4 is usual.",
        "Length may be what the discriminator reads, or the student stops too early.",
        "See in the samples where they stop; raise gad.kl_coefficient if the length fell "
        "during GAD, or train the warmup longer if it was short from the start.",
        low=0.7,
    ),
    Bound(
        "rollout/length_ratio",
        "The samples are much longer than the teacher's answers",
        "Length ratio {}; 0.7 to 1.4 is usual.",
        "Length may be what the discriminator reads, or the student has not learned to end.",
        "Compare the shares of finished answers; raise gad.kl_coefficient if the length grew "
        "during GAD, or train the warmup longer if it was long from the start.",
        high=1.4,
    ),
    Bound(
        "student/entropy_nats",
        "The student hardly varies its answers any more",
        "Entropy {} nats a token; below 0.1 there is about one answer a prompt.",
        "Collapse onto a few answers the discriminator likes, or a task that leaves no choice.",
        "Raise gad.kl_coefficient or sampling.temperature, or stop earlier.",
        low=0.1,
    ),
    Bound(
        "detail/sampler_gap_nats",
        "The sampler and the trainer disagree",
        "Their log-probabilities of the same tokens differ by {} nats on average; at one update a "
        "batch they should be equal but for rounding, 0.01 at most.",
        "Another number type, old weights in the sampler, or log-probabilities taken before the temperature.",
        "Use one dtype for both. If the gap stays, report it: the loss takes the two as equal.",
        high=0.01,
    ),
)


def out_of_bounds(evidence: Evidence) -> Iterator[Remark]:
    """A remark for each bound that the last quarter of GAD is outside of."""
    for bound in BOUNDS:
        curve = evidence.curve("gad", bound.metric)
        if curve and not bound.low <= curve.last_quarter() < bound.high:
            seen = bound.evidence.format(number(curve.last_quarter()))
            yield Remark(bound.what, f"Last quarter of GAD: {_lower(seen)}", bound.cause, bound.change)


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
