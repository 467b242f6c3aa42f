"""What a fault is: where it is planted, and what has to find it within how many steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

By = Literal["config", "audit", "load", "alarm"]
"""Who finds a fault: the check of the recipe, the audit, the check of a model at its load, an alarm."""


def nothing(folder: Path) -> None:
    """Leave a prepared folder as it is."""


@dataclass(frozen=True)
class Fault:
    """A fault, and what is to find it.

    Attributes:
        name: what is wrong, in a few words.
        where: what it is planted in.
        by: who is to find it.
        finds: the name of the finding or alarm; of a refusal, a part of its text.
        within: steps of the stage within which it is found; 0 for what is found before the first.
        stage: the training stage that shows it; what is found before training needs none.
        settings: `key=value` of the recipe; `{folder}` stands for the prepared folder.
        plant: changes data, models or checkpoints of the prepared folder.
        around: wraps an object that the stage works with while it runs.
        beside: alarms that are true of this fault as well.
    """

    name: str
    where: str
    by: By
    finds: str
    within: int = 0
    stage: Literal["warmup", "gad"] = "gad"
    settings: tuple[str, ...] = ()
    plant: Callable[[Path], None] = nothing
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    beside: tuple[str, ...] = ()

    @property
    def needs_start(self) -> bool:
        """Whether it starts from what a clean warmup has made."""
        return self.by in ("load", "alarm")


@dataclass(frozen=True)
class Sight:
    """Something that was found.

    Attributes:
        by: who found it.
        name: of the finding or alarm; of a refusal, its text.
        stage: where.
        step: after how many steps of the stage.
        evidence: in figures.
        is_mechanical: whether, as a finding of the audit, it stops the run.
    """

    by: By
    name: str
    stage: str
    step: int
    evidence: str
    is_mechanical: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run with a fault, or a clean one, came to."""

    sights: tuple[Sight, ...]
    steps: int
    seconds: float

    def of(self, fault: Fault) -> Sight | None:
        """What was to find the fault, if it did."""
        for sight in self.sights:
            is_it = fault.finds in sight.name if sight.by in ("config", "load") else fault.finds == sight.name
            if sight.by == fault.by and is_it:
                return sight
        return None

    def consequences(self, fault: Fault) -> list[Sight]:
        """What else was found and is true of the fault."""
        found = self.of(fault)
        return [sight for sight in self.sights if sight is not found and sight.name in fault.beside]

    def false(self, fault: Fault) -> list[Sight]:
        """What else was found and is not."""
        found = self.of(fault)
        return [sight for sight in self.sights if sight is not found and sight.name not in fault.beside]
