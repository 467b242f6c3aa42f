"""What an alarm is: the entry of the catalogue, and what it says when it is raised."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from gadfly.alarms.advice import in_words_of
from gadfly.alarms.history import History


@dataclass(frozen=True)
class Finding:
    """What a detector saw.

    Attributes:
        evidence: the figures, in a sentence.
        since: the first step that is part of the evidence; what was before is not known to be bad.
    """

    evidence: str
    since: int


@dataclass(frozen=True)
class Change:
    """How a remedy changes a number of the recipe: so many times what it was, within bounds.

    Example:
        >>> Change(10.0, at_least=0.01).of(0.0005)
        0.01
    """

    times: float
    at_least: float = 0.0
    at_most: float = float("inf")

    def of(self, value: float) -> float:
        """The changed number; rounded, so that ten times 1e-6 is 1e-5."""
        changed = min(max(self.times * value, self.at_least), self.at_most)
        # A bound that the number is beyond already does not turn the change round.
        changed = max(changed, value) if self.times > 1 else min(changed, value)
        return float(f"{changed:.12g}")


Remedy = Mapping[str, Change]
"""Changes by dotted key of the recipe; `{stage}` stands for the stage the alarm is raised in."""


@dataclass(frozen=True)
class Kind:
    """An entry of the catalogue.

    Attributes:
        name: as in `alarms.actions`.
        title: what is the matter, in a few words.
        meaning: what is measured, and when that is too much.
        reads: the metrics it looks at; it is raised at a row that has one of them.
        cause: what is likely behind it.
        advice: what to change, in words that depend on the stage (`advice.py`).
        find: looks at a stage's rows so far, the newest last.
        remedy: what going back and on changes; empty where no setting would help.
        rests: whether the alarm ends by letting the discriminator rest, since the student can catch up; what
            is wrong with the discriminator's own weights, or scores, stays while it rests.
        stages: where it is looked for; everywhere if empty.
        hidden_by: other alarms that say the same more exactly, and leave nothing to add.
        held_out: whether it rests on held-out prompts, of which a handful says nothing.
    """

    name: str
    title: str
    meaning: str
    reads: tuple[str, ...]
    cause: str
    advice: str
    find: Callable[[History], Finding | None]
    remedy: Remedy = field(default_factory=lambda: MappingProxyType({}))
    rests: bool = False
    stages: tuple[str, ...] = ()
    hidden_by: tuple[str, ...] = ()
    held_out: bool = False

    def advice_in(self, stage: str) -> str:
        """What to change where it is raised in that stage."""
        return in_words_of(stage, self.advice)


@dataclass(frozen=True)
class Alarm:
    """One alarm that stands: what, when, the evidence, the likely cause, what to change.

    Attributes:
        name: its entry in the catalogue.
        step: the newest step when it was found.
        since: the first step that is part of the evidence.
        remedy: what going back and on changes.
    """

    name: str
    title: str
    step: int
    since: int
    evidence: str
    cause: str
    advice: str
    remedy: Remedy
