"""What was collected from the teacher: answers, their marks, who answered, and what it cost."""

from dataclasses import dataclass

from gadfly.api.spending import spell_dollars
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.wording import counted, listed, percent

_MEANINGS = {
    "cut": "the teacher's limit cut it",
    "content-filter": "the provider withheld it",
    "refusal": "the teacher would not answer, or so it looks",
    "empty": "no text",
    "rejected": "the server turned the question down for good",
}


@dataclass(frozen=True)
class Marked:
    """The answers with one mark."""

    mark: str
    meaning: str
    count: str
    share: str
    use: str


@dataclass(frozen=True)
class Collection:
    """The answers on disk."""

    answers: str
    """How many, and whose."""
    cost: str
    marked: tuple[Marked, ...]


def collection(evidence: Evidence) -> Collection | None:
    """What the collect stage noted; None if the answers came from elsewhere."""
    facts = evidence.collect
    if not facts:
        return None
    total = facts["answers"]
    teachers = sorted(facts["teachers"].items(), key=lambda teacher: -teacher[1])
    names = [name if len(teachers) == 1 else f"{name} ({count:,})" for name, count in teachers]
    tokens = f"{facts['prompt_tokens']:,} tokens of questions, {facts['completion_tokens']:,} of answers"
    used = evidence.recipe.teacher.train_on
    marked = tuple(
        Marked(
            mark,
            _MEANINGS.get(mark, ""),
            f"{count:,}",
            percent(count / total) if total else "",
            "trained on" if mark in used else "left out",
        )
        for mark, count in sorted(facts["marked"].items(), key=lambda found: -found[1])
    )
    return Collection(
        counted(total, "answer") + (f" from {listed(names)}" if names else ""),
        f"{counted(facts['requests'], 'request')}, {tokens}: {_price(facts['dollars'])}",
        marked,
    )


def _price(dollars: int | float | None) -> str:
    if dollars is None:
        return "cost not known, for want of teacher.price"
    return spell_dollars(float(dollars))
