"""Figures with their 95 % intervals: a share, a mean, a mean of paired differences, anything by bootstrap."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_LEVEL = 0.95
_RESAMPLES = 500

Case = TypeVar("Case")


@dataclass(frozen=True)
class Figure:
    """An estimate from `n` cases and its 95 % interval, in the unit of the values.

    Example:
        >>> Figure(0.5, 10, 0.24, 0.76).as_record()
        {'value': 0.5, 'n': 10, 'interval': [0.24, 0.76]}
    """

    value: float
    n: int
    low: float
    """Lower end of the interval; minus infinity where a lone value says nothing about spread."""
    high: float

    def as_record(self) -> dict[str, float | int | list[float | None]]:
        """The figure as in `summary.json`; an infinite end is null, since JSON has no infinity."""
        ends = [end if math.isfinite(end) else None for end in (self.low, self.high)]
        return {"value": self.value, "n": self.n, "interval": ends}


def share(successes: Sequence[bool]) -> Figure:
    """Share of true cases with its Wilson interval, which stays within [0, 1].

    Raises:
        ValueError: there is no case.
    """
    from scipy.stats import binomtest  # noqa: PLC0415  takes half a second

    if not successes:
        raise ValueError("share: no case given; it needs at least one")
    count, n = sum(map(bool, successes)), len(successes)
    ends = binomtest(count, n).proportion_ci(_LEVEL, method="wilson")
    return Figure(count / n, n, float(ends.low), float(ends.high))


def mean(values: Sequence[int | float]) -> Figure:
    """Mean with Student's t interval.

    One value has an infinite interval. Equal values have one of width 0: the sample shows no
    spread, which does not mean there is none.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    from scipy.stats import t  # noqa: PLC0415  takes half a second

    if not values:
        raise ValueError("mean: no value given; it needs at least one")
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"mean: value {number} is {value}; it must be finite")
    n = len(values)
    if n == 1:
        return Figure(float(values[0]), 1, -math.inf, math.inf)
    if min(values) == max(values):
        # Rounding would make a spread of some 1e-17 out of it.
        return Figure(float(values[0]), n, float(values[0]), float(values[0]))
    centre = math.fsum(values) / n
    variance = math.fsum((value - centre) ** 2 for value in values) / (n - 1)
    margin = float(t.ppf((1 + _LEVEL) / 2, n - 1)) * math.sqrt(variance / n)
    return Figure(centre, n, centre - margin, centre + margin)


def mean_difference(a: Sequence[int | float], b: Sequence[int | float]) -> Figure:
    """Mean of `a - b`, case by case, with Student's t interval (the paired t test's); see `mean`.

    Raises:
        ValueError: the lengths differ, there is no pair, or a difference is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"mean_difference: {len(a)} and {len(b)} values; pairs need as many of each")
    return mean([x - y for x, y in zip(a, b, strict=True)])


def bootstrap(cases: Sequence[Case], statistic: Callable[[Sequence[Case]], float]) -> Figure:
    """A statistic of the cases with its percentile bootstrap interval (Efron 1979).

    The resamples are the same at every call with as many cases, so equal cases give equal
    intervals.

    Raises:
        ValueError: there is no case.
    """
    if not cases:
        raise ValueError("bootstrap: no case given; it needs at least one")
    rng = random.Random(0)
    values = sorted(statistic(rng.choices(cases, k=len(cases))) for _ in range(_RESAMPLES))
    tail = round((1 - _LEVEL) / 2 * _RESAMPLES)
    return Figure(statistic(cases), len(cases), values[tail], values[-1 - tail])
