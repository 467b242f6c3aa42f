"""The result: a table a test set, its main figure drawn, and what may be said of GAD and SeqKD."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gadfly.config import Recipe
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.wording import (
    MODELS,
    duration,
    figure_label,
    interval,
    listed,
    model_label,
    number,
)
from gadfly.statistics import Figure

# The figure that decides, best first; both are better when higher.
_MAIN_FIGURES = ("valid_fraction", "rouge_l")

_FIGURE_ORDER = (*_MAIN_FIGURES, "", "response_tokens", "finished_fraction", "repetition")

# Stages whose time a model's training took, its own included.
_STAGES_BEFORE = {
    "warmup": ("discriminator-lm", "warmup"),
    "gad": ("discriminator-lm", "warmup", "gad"),
}

Outcome = Literal["above", "below", "not distinguishable", "no comparison"]


@dataclass(frozen=True)
class Verdict:
    """Where GAD stands beside SeqKD on one test set, in a sentence made from the figures.

    `is_gain` only if the table holds all that a claim needs.
    """

    outcome: Outcome
    is_gain: bool
    sentence: str
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One figure of one model as the table shows it."""

    value: str
    interval: str
    n: str


@dataclass(frozen=True)
class Mark:
    """The main figure of a model as the drawing shows it: places in percent of the axis."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TableRow:
    """One model: its name, what it is, how long it trained, and a cell for each figure."""

    model: str
    label: str
    note: str
    seconds: str
    cells: tuple[Cell | None, ...]
    mark: Mark | None
    main_value: str


@dataclass(frozen=True)
class ResultTable:
    """Everything known of one test set."""

    name: str
    how: str
    """Greedy or sampled, where the recipe says so."""
    n: str
    """Number of cases where it is the same for every figure; else empty, and each cell has its own."""
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    main: str | None
    """What the drawing shows; None if no model has a main figure."""
    axis_end: float
    verdict: Verdict


def result_tables(evidence: Evidence) -> list[ResultTable]:
    """One table a test set."""
    return [_table(evidence, name) for name in evidence.test_sets]


def how_sampled(recipe: Recipe, test_set: str) -> str:
    """Whether answers to a test set are greedy or sampled; empty if the recipe does not say."""
    for name in recipe.data.test:
        for temperature in recipe.generate.temperatures:
            if temperature == 0 and test_set == name:
                return "greedy"
            if test_set == f"{name}-t{temperature:g}":
                return f"sampled at temperature {temperature:g}"
    return ""


def _table(evidence: Evidence, name: str) -> ResultTable:
    figures = {
        model: evidence.evaluation[model][name]
        for model in _in_order(list(evidence.evaluation), tuple(MODELS), before="discriminator-lm")
        if name in evidence.evaluation[model]
    }
    known = list(dict.fromkeys(figure for row in figures.values() for figure in row))
    columns = _in_order(known, _FIGURE_ORDER, before="")
    main = next((figure for figure in _MAIN_FIGURES if figure in known), None)
    end = _axis_end([row[main] for row in figures.values() if main in row]) if main else 1.0
    how = how_sampled(evidence.recipe, name)
    rows = tuple(
        TableRow(
            model=model,
            label=model_label(model),
            note=MODELS[model][1] if model in MODELS else "a further arm",
            seconds=_training_time(evidence, model),
            cells=tuple(_cell(row.get(column)) for column in columns),
            mark=_mark(row[main], end) if main in row else None,
            main_value=number(row[main].value) if main in row else "",
        )
        for model, row in figures.items()
    )
    labels = tuple(figure_label(column) for column in columns)
    verdict = _verdict(figures, main)
    counts = {cell.n for row in rows for cell in row.cells if cell}
    n = counts.pop() if len(counts) == 1 else ""
    return ResultTable(name, how, n, labels, rows, figure_label(main) if main else None, end, verdict)


def _in_order(names: Sequence[str], order: tuple[str, ...], *, before: str) -> list[str]:
    """Known names in their order; unknown ones just before the name `before`, as they come."""
    places = {name: place for place, name in enumerate(order)}
    return sorted(names, key=lambda name: places.get(name, places[before] - 0.5))


def _cell(figure: Figure | None) -> Cell | None:
    if figure is None:
        return None
    return Cell(number(figure.value), interval(figure.low, figure.high), f"{figure.n:,}")


def _axis_end(figures: Sequence[Figure]) -> float:
    """A round number that holds every finite end, 1 at most where all are shares."""
    ends = [end for figure in figures for end in (figure.value, figure.high) if math.isfinite(end)]
    largest = max(ends)
    return next((end for end in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if largest <= end), largest)


def _mark(figure: Figure, end: float) -> Mark:
    low, value, high = (
        round(100 * min(max(place / end, 0.0), 1.0), 2) for place in (figure.low, figure.value, figure.high)
    )
    return Mark(value, low, high)


def _training_time(evidence: Evidence, model: str) -> str:
    if model == "base":
        return "none"
    stages = [name for name in _STAGES_BEFORE.get(model, (model,)) if name in evidence.stages]
    seconds = [evidence.stages[name].seconds for name in stages]
    known = [second for second in seconds if second is not None]
    return duration(sum(known)) if known and len(known) == len(seconds) else ""


def _verdict(figures: Mapping[str, Mapping[str, Figure]], main: str | None) -> Verdict:
    """GAD against SeqKD, at equal time where that is in the table."""
    baseline = "seqkd-equal-time" if "seqkd-equal-time" in figures else "seqkd"
    absent = [model_label(name) for name in ("gad", baseline) if main not in figures.get(name, {})]
    if main is None or absent:
        why = f"{listed(absent)} not in the table" if main else "no figure to compare by"
        return Verdict("no comparison", False, f"GAD and SeqKD cannot be compared here: {why}.")
    ours, theirs = figures["gad"][main], figures[baseline][main]
    outcome = _compare(ours, theirs)
    numbers = f"{_with_interval(ours)} against {_with_interval(theirs)}"
    other = "SeqKD at equal time" if baseline == "seqkd-equal-time" else "SeqKD"
    said = f"in {figure_label(main)}: {numbers}"
    if outcome == "not distinguishable":
        sentence = f"GAD and {other} are not distinguishable {said}. The 95 % intervals overlap."
    else:
        sentence = f"GAD is {outcome} {other} {said}. The 95 % intervals do not overlap."
    missing = _missing_for_a_claim(figures, main) if outcome == "above" else []
    is_gain = outcome == "above" and not missing
    return Verdict(outcome, is_gain, sentence, (*missing, *_lengths(figures, baseline)))


def _compare(ours: Figure, theirs: Figure) -> Outcome:
    if ours.low > theirs.high:
        return "above"
    return "below" if ours.high < theirs.low else "not distinguishable"


def _missing_for_a_claim(figures: Mapping[str, Mapping[str, Figure]], main: str) -> list[str]:
    """Why a higher figure is no gain yet, a sentence each."""
    reasons = []
    needed = ("base", "seqkd-equal-time")
    absent = [model_label(name) for name in needed if main not in figures.get(name, {})]
    if absent:
        reasons.append(f"This is no claim of a gain: {listed(absent)} not in the table.")
    elif _compare(figures["gad"][main], figures["base"][main]) != "above":
        reasons.append("This is no claim of a gain: GAD is not above the base model.")
    if main == "rouge_l":
        reasons.append(
            "ROUGE-L is a diagnostic: it says how close the wording is to the teacher's, not which "
            "answer is better."
        )
    return reasons


def _lengths(figures: Mapping[str, Mapping[str, Figure]], baseline: str) -> list[str]:
    lengths = [figures[model].get("response_tokens") for model in ("gad", baseline)]
    if None in lengths:
        return ["Their lengths are not known, so part of the difference may be length."]
    ours, theirs = (number(figure.value) for figure in lengths if figure)
    return [f"Mean length: {ours} tokens against {theirs}."]


def _with_interval(figure: Figure) -> str:
    return f"{number(figure.value)} ({interval(figure.low, figure.high)}, n\u00a0=\u00a0{figure.n:,})"
