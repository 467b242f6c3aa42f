"""What a benchmark found: how one way of doing something compares with another, measured side by side."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Result:
    """A ratio (no unit, higher is better): the median over pairs measured in turn, and the extremes."""

    bench: str
    ratio: float
    low: float
    high: float
    wanted: float
    """The least that is promised; 0 for a figure without a promise."""
    details: str = ""
    """The figures behind it, in one line."""

    @property
    def is_met(self) -> bool:
        """Whether the promise is kept."""
        return self.ratio >= self.wanted

    @classmethod
    def of_pairs(cls, bench: str, ratios: Sequence[float], wanted: float, details: str = "") -> "Result":
        """The result of one ratio a pair."""
        return cls(bench, statistics.median(ratios), min(ratios), max(ratios), wanted, details)

    @classmethod
    def of_times(
        cls, bench: str, times: Sequence[tuple[float, float]], wanted: float, details: str
    ) -> "Result":
        """The result of pairs of seconds, the rival's and ours."""
        rival, ours = (statistics.median(seconds) for seconds in zip(*times, strict=True))
        figures = f"{ours:.3g} s against {rival:.3g} s, {len(times)} pairs, {torch.get_num_threads()} threads"
        return cls.of_pairs(bench, [theirs / own for theirs, own in times], wanted, f"{figures}; {details}")


def time_in_turn(
    pairs: int, rival: Callable[[], object], ours: Callable[[], object]
) -> list[tuple[float, float]]:
    """Seconds of both ways, pair by pair, the order changing; a pair before that warms up."""
    times = []
    for pair in range(pairs + 1):
        if pair % 2:
            times.append((seconds(rival), seconds(ours)))
        else:
            own = seconds(ours)
            times.append((seconds(rival), own))
    return times[1:]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a piece of work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
