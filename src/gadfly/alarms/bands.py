"""Means and trends of a window with their noise bands: what may be said of a handful of noisy values.

A band is three standard errors wide on either side, as Student's t has it for the few values there are.
Steps that follow each other are alike, so the standard error is widened by the correlation of neighbours
(the effective sample size of a first-order autoregression).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_SIGMAS = 3.0
# Neighbours more alike than this would widen a band without end.
_MOST_ALIKE = 0.9


@dataclass(frozen=True)
class Band:
    """An estimate and the band its noise leaves around it, in the unit of the values."""

    value: float
    low: float
    high: float

    def is_above(self, bound: float) -> bool:
        """Whether all of the band lies above."""
        return self.low > bound

    def is_below(self, bound: float) -> bool:
        """Whether all of the band lies below."""
        return self.high < bound


def mean_band(values: Sequence[float]) -> Band:
    """The mean of a window; of fewer than two values the band is without end.

    Example:
        >>> mean_band([0.5, 0.5, 0.5])
        Band(value=0.5, low=0.5, high=0.5)
        >>> mean_band([0.2, 0.8, 0.3, 0.7]).is_above(0.1)
        False
    """
    count = len(values)
    if count < 2:
        return Band(values[0] if values else math.nan, -math.inf, math.inf)
    mean = math.fsum(values) / count
    rest = [value - mean for value in values]
    error = math.sqrt(_square(rest) / (count - 1) / count) * _widening(rest)
    return _around(mean, error, count - 1)


def change_band(values: Sequence[float]) -> Band:
    """How much the straight line through a window rises from its first value to its last.

    Example:
        >>> change_band([1.0, 2.0, 3.0, 4.0])
        Band(value=3.0, low=3.0, high=3.0)
        >>> change_band([1.0, 3.0, 1.5, 2.5, 1.2]).is_above(0.0)
        False
    """
    count = len(values)
    if count < 3:
        return Band(values[-1] - values[0] if values else math.nan, -math.inf, math.inf)
    mean, middle = math.fsum(values) / count, (count - 1) / 2
    places = [place - middle for place in range(count)]
    slope = math.fsum(place * value for place, value in zip(places, values, strict=True)) / _square(places)
    rest = [value - mean - slope * place for place, value in zip(places, values, strict=True)]
    error = math.sqrt(_square(rest) / (count - 2) / _square(places)) * _widening(rest)
    return _around(slope * (count - 1), error * (count - 1), count - 2)


def _around(value: float, error: float, freedom: int) -> Band:
    # Below this there is nothing but the rounding of the sums.
    if error <= 1e-12 * abs(value):
        return Band(value, value, value)
    margin = _students_t(freedom) * error
    return Band(value, value - margin, value + margin)


def _students_t(freedom: int) -> float:
    """The quantile of Student's t that leaves out as much as three sigmas do (Cornish-Fisher expansion)."""
    z = _SIGMAS
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + first + second


def _widening(rest: Sequence[float]) -> float:
    """How much wider the band is for neighbours that are alike."""
    total = _square(rest)
    if total == 0 or len(rest) < 5:
        return 1.0
    alike = math.fsum(a * b for a, b in itertools.pairwise(rest)) / total
    alike = min(max(alike, 0.0), _MOST_ALIKE)
    return math.sqrt((1 + alike) / (1 - alike))


def _square(values: Sequence[float]) -> float:
    return math.fsum(value * value for value in values)
