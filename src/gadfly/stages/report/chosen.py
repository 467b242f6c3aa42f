"""How `best` was chosen: by a judge on held-out prompts where that was done, else by held-out ROUGE-L."""

from dataclasses import dataclass

from gadfly.run_folder import Record
from gadfly.stages.report.reading import Evidence, read_figure
from gadfly.stages.report.wording import counted, figure_label, interval, number, stage_label
from gadfly.statistics import Figure

_BY = {
    "rouge_l": "ROUGE-L, a diagnostic",
    "judge_score": "the judge's score",
    "tell_accuracy_same_length": "the classifier, which tells it least from the teacher at the same length",
}


@dataclass(frozen=True)
class Candidate:
    """One checkpoint that could have been `best`."""

    step: str
    value: str
    interval: str
    is_chosen: bool


@dataclass(frozen=True)
class Choice:
    """The choice of one stage."""

    stage: str
    test_set: str
    """What the candidates' answers are kept under, as `generations/NAME.jsonl`."""
    sentence: str
    figure: str
    candidates: tuple[Candidate, ...]


def choices(evidence: Evidence) -> list[Choice]:
    """Every choice by a judge that still holds: `best` has not been pointed elsewhere since."""
    return [
        _choice(stage, noted)
        for stage, noted in evidence.best.items()
        if noted["step"] == _best_step(evidence, stage, noted)
    ]


def best_words(evidence: Evidence, stage: str, step: int) -> str:
    """Which checkpoint of a stage is the best, and by what."""
    noted = evidence.best.get(stage, {})
    by = noted["by"] if noted.get("step") == step else "rouge_l"
    on = "" if by == "rouge_l" else f" on {counted(noted['n'], 'held-out prompt')}"
    return f"best kept checkpoint at step {step:,}, by {_BY.get(by, figure_label(by))}{on}"


def _best_step(evidence: Evidence, stage: str, noted: Record) -> int:
    """Where the link points; a copied folder may have lost it, and then the note stands alone."""
    state = evidence.stages.get(stage)
    return int(noted["step"]) if state is None or state.best_step is None else state.best_step


def _choice(stage: str, noted: Record) -> Choice:
    figures = {
        int(name.rsplit("step-", 1)[-1]): figure
        for name, record in noted["candidates"].items()
        if (figure := read_figure({"n": noted["n"], **record}))
    }
    step, by = int(noted["step"]), str(noted["by"])
    sentence = (
        f"{stage_label(stage)}'s best checkpoint is that of step {step:,}, chosen by "
        f"{_BY.get(by, figure_label(by))}, on {counted(noted['n'], 'held-out prompt')}, never by the "
        f"training reward.{_overlap(figures, step)}"
    )
    column = figure_label(by)
    candidates = tuple(
        Candidate(f"{at:,}", number(figure.value), interval(figure.low, figure.high), at == step)
        for at, figure in sorted(figures.items())
    )
    return Choice(stage_label(stage), str(noted["set"]), sentence, column, candidates)


def _overlap(figures: dict[int, Figure], step: int) -> str:
    if step not in figures or len(figures) == 1:
        return ""
    best, others = figures[step], [figure for at, figure in figures.items() if at != step]
    close = sum(best.low <= other.high and other.low <= best.high for other in others)
    if not close:
        return " Its interval overlaps none of the others."
    return (
        f" Its interval overlaps those of {close} of the {counted(len(others), 'other candidate')}, so "
        "chance may have chosen among them."
    )
