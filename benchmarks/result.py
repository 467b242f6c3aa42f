"""What a benchmark found: how one way of doing something compares with another, measured side by side."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """A ratio (no unit, higher is better): the median over pairs measured in turn, and the extremes."""

    bench: str
    ratio: float
    low: float
    high: float
    wanted: float
    """The least that is promised."""
    details: str = ""
    """The figures behind it, in one line."""

    @classmethod
    def of_pairs(cls, bench: str, ratios: Sequence[float], wanted: float, details: str = "") -> "Result":
        """The result of one ratio a pair."""
        return cls(bench, statistics.median(ratios), min(ratios), max(ratios), wanted, details)
