"""The result: a table a test set, its main figure drawn, and what may be said of GAD and SeqKD."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gadfly.config import Recipe
from gadfly.records import generations_file
from gadfly.stages.report.deciding import main_figure
from gadfly.stages.report.judged import judge_words, tell_words
from gadfly.stages.report.pairs import PairRow, pair_rows
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.verdict import Verdict, verdict_on
from gadfly.stages.report.wording import (
    EXPLANATIONS,
    MODELS,
    duration,
    figure_label,
    interval,
    model_label,
    number,
)
from gadfly.statistics import Figure

_FIGURE_ORDER = (
    "valid_fraction",
    "judge_score",
    "judge_score_of_means",
    "tell_accuracy",
    "tell_accuracy_same_length",
    "rouge_l",
    "",
    "response_tokens",
    "finished_fraction",
    "repetition",
)

# Where an answer is as good as what it is scored beside.
_PARITY = {"judge_score": 50.0}

_AXIS_ENDS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0)

# Stages whose time a model's training took, its own included.
_STAGES_BEFORE = {
    "warmup": ("discriminator-lm", "warmup"),
    "gad": ("discriminator-lm", "warmup", "gad"),
}


@dataclass(frozen=True)
class Column:
    """One figure: what it is called, and what it is where the name does not say so."""

    name: str
    label: str
    explanation: str
    n: str
    """Number of cases where it is the same for every model but not in the whole table; else empty."""


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
    """Number of cases where it is the same for every figure; else empty, and a column or cell has its own."""
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    main: str | None
    """What the drawing shows; None if no model has a main figure."""
    axis_end: float
    parity: float | None
    """Where on the axis, in percent, an answer is as good as what it is scored beside; None if nowhere."""
    verdict: Verdict
    pairs: tuple[PairRow, ...]
    notes: tuple[str, ...]
    """Sentences on who judged and on how the answers are told from the teacher's."""


def result_tables(evidence: Evidence) -> list[ResultTable]:
    """One table a test set."""
    return [_table(evidence, name) for name in evidence.test_sets]


def how_sampled(recipe: Recipe, test_set: str) -> str:
    """Whether answers to a test set are greedy or sampled; empty if the recipe does not say."""
    for name in recipe.data.test:
        for temperature in recipe.generate.temperatures:
            if test_set == generations_file(name, temperature):
                return "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    return ""


def _table(evidence: Evidence, name: str) -> ResultTable:
    unordered = evidence.figures_of(name)
    models = _in_order(list(unordered), tuple(MODELS), before="discriminator-lm")
    figures = {model: unordered[model] for model in models}
    known = list(dict.fromkeys(figure for row in figures.values() for figure in row))
    names = _in_order(known, _FIGURE_ORDER, before="")
    main = main_figure(figures)
    end = _axis_end([row[main] for row in figures.values() if main in row]) if main else 1.0
    rows = tuple(
        TableRow(
            model=model,
            label=model_label(model),
            note=MODELS[model][1] if model in MODELS else "a further arm",
            seconds=_training_time(evidence, model),
            cells=tuple(_cell(row.get(column)) for column in names),
            mark=_mark(row[main], end) if main in row else None,
            main_value=number(row[main].value) if main in row else "",
        )
        for model, row in figures.items()
    )
    n = _same([cell for row in rows for cell in row.cells])
    parity = _PARITY.get(main or "", math.inf)
    return ResultTable(
        name=name,
        how=how_sampled(evidence.recipe, name),
        n=n,
        columns=tuple(
            Column(column, figure_label(column), EXPLANATIONS.get(column, ""), "" if n else _same(cells))
            for column, cells in zip(names, zip(*(row.cells for row in rows), strict=True), strict=True)
        ),
        rows=rows,
        main=figure_label(main) if main else None,
        axis_end=end,
        parity=round(100 * parity / end, 2) if parity <= end else None,
        verdict=verdict_on(evidence, name),
        pairs=pair_rows(evidence, name),
        notes=tuple(note for note in (tell_words(figures), judge_words(evidence, name)) if note),
    )


def _same(cells: Sequence[Cell | None]) -> str:
    """The number of cases of all cells; empty if they differ."""
    counts = {cell.n for cell in cells if cell}
    return counts.pop() if len(counts) == 1 else ""


def _in_order(names: Sequence[str], order: tuple[str, ...], *, before: str) -> list[str]:
    """Known names in their order; unknown ones just before the name `before`, as they come."""
    places = {name: place for place, name in enumerate(order)}
    return sorted(names, key=lambda name: places.get(name, places[before] - 0.5))


def _cell(figure: Figure | None) -> Cell | None:
    if figure is None:
        return None
    return Cell(number(figure.value), interval(figure.low, figure.high), f"{figure.n:,}")


def _axis_end(figures: Sequence[Figure]) -> float:
    """A round number that holds every finite end, 1 at most where all are shares, 100 for scores."""
    ends = [end for figure in figures for end in (figure.value, figure.high) if math.isfinite(end)]
    largest = max(ends)
    return next((end for end in _AXIS_ENDS if largest <= end), largest)


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
