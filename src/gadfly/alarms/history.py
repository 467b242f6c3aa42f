"""What a stage has logged so far, metric by metric: all that an alarm looks at."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gadfly.metrics import without_time

# Values that make up the start of a stage, which later ones are held against.
_START = 5


# What exceeds this is a number on paper only: a sum of such squares is beyond all floats.
_MOST = 1e100


def _is_finite(value: int | float) -> bool:
    return -_MOST < value < _MOST


@dataclass
class Series:
    """One metric at the steps that have it, finite values only."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """How many steps have it."""
        return len(self.values)

    def last(self, count: int) -> "Series":
        """The newest values."""
        return Series(self.steps[-count:], self.values[-count:])

    def start(self) -> float:
        """Mean of the first few values."""
        first = self.values[:_START]
        return sum(first) / len(first)

    def between(self, first: int, last: int) -> list[float]:
        """The values of the steps from `first` to `last`."""
        return [value for step, value in zip(self.steps, self.values, strict=True) if first <= step <= last]


@dataclass(frozen=True)
class Circumstances:
    """What has to be known of a stage to read its metrics.

    Attributes:
        window: steps over which a trend is judged.
        group_size: samples a prompt; 0 where none are drawn.
        held_out: prompts of each evaluation.
        is_half: whether sampler or trainer computes in bfloat16.
    """

    window: int = 20
    group_size: int = 0
    held_out: int = 0
    is_half: bool = False


class History:
    """The rows of one stage, in the order they were logged.

    Example:
        >>> history = History("gad")
        >>> history.add({"stage": "gad", "step": 1, "student/kl_nats": 0.01, "time/unix": 5.0})
        >>> history["student/kl_nats"].values, len(history["student/loss"])
        ([0.01], 0)
    """

    def __init__(self, stage: str, circumstances: Circumstances | None = None):
        self.stage = stage
        self.circumstances = circumstances or Circumstances()
        self.newest: Mapping[str, Any] = {}
        """The row logged last."""
        self._series: dict[str, Series] = {}

    @property
    def step(self) -> int:
        """The step of the newest row."""
        return int(self.newest.get("step", 0))

    @property
    def window(self) -> int:
        """Steps over which a trend is judged."""
        return self.circumstances.window

    @property
    def names(self) -> Sequence[str]:
        """Every metric there is a value of."""
        return list(self._series)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of this stage."""
        self.newest = row
        for name, value in without_time(dict(row)).items():
            if name in ("stage", "step") or not isinstance(value, int | float) or not _is_finite(value):
                continue
            series = self._series.setdefault(name, Series())
            series.steps.append(int(row["step"]))
            series.values.append(float(value))

    def evaluated(self, metric: str) -> Series:
        """A metric of evaluations so far, without one that the newest follows at less than half the distance.

        A stage's last evaluation may come a step after another: the same again, and no second witness.
        """
        series = self[metric]
        gaps = [later - earlier for earlier, later in itertools.pairwise(series.steps)]
        if len(gaps) < 2 or 2 * gaps[-1] >= gaps[-2]:
            return series
        return Series([*series.steps[:-2], series.steps[-1]], [*series.values[:-2], series.values[-1]])

    def __getitem__(self, metric: str) -> Series:
        """A metric's values so far; there may be none."""
        return self._series.get(metric, Series())
