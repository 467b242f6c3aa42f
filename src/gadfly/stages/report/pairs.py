"""Pairs of models before a judge: win rates as judged and at equal length, and how to read them."""

from dataclasses import dataclass

from gadfly.run_folder import Record
from gadfly.stages.report.deciding import FEW_CASES
from gadfly.stages.report.reading import Evidence, read_figure
from gadfly.stages.report.wording import interval, number, spoken
from gadfly.statistics import Figure


@dataclass(frozen=True)
class Rate:
    """A win rate as the page shows it; the places are in percent of an axis from 0 to 1."""

    value: str
    interval: str
    place: float
    low: float
    high: float


@dataclass(frozen=True)
class PairRow:
    """Two models before the judge; the rates are the first one's."""

    a: str
    label: str
    reading: str
    """Which one is preferred, if the intervals say so."""
    counts: str
    """Wins, ties and losses of the first model."""
    ties: str
    """How many the judge meant, and in how many its two verdicts are at odds; empty if not known."""
    unparsable: int
    n: int
    """Prompts with a verdict."""
    raw: Rate | None
    """None where no verdict could be read; so is `controlled`."""
    controlled: Rate | None
    characters: str


def pair_rows(evidence: Evidence, test_set: str) -> tuple[PairRow, ...]:
    """All pairs that were judged on a test set."""
    return tuple(_row(pair) for pair in evidence.pairwise.get(test_set, {}).values())


def _row(pair: Record) -> PairRow:
    a, b = spoken(pair["a"]), spoken(pair["b"])
    raw, controlled = (read_figure(pair.get(name)) for name in ("win_rate", "length_controlled_win_rate"))
    lengths = [read_figure(pair["characters"].get(model)) for model in (pair["a"], pair["b"])]
    return PairRow(
        a=pair["a"],
        label=_capitalised(f"{a} against {b}"),
        reading=_reading(a, b, raw, controlled),
        counts=f"{pair['win']:,} / {pair['tie']:,} / {pair['loss']:,}",
        ties=_ties(pair["tie"], pair.get("agreed_ties")),
        unparsable=pair["unparsable"],
        n=pair["win"] + pair["tie"] + pair["loss"],
        raw=_rate(raw),
        controlled=_rate(controlled),
        characters=" against ".join(number(length.value) if length else "–" for length in lengths),  # noqa: RUF001
    )


def _ties(all_ties: int, agreed: int | None) -> str:
    if not all_ties or agreed is None:
        return ""
    return f"ties: {agreed:,} meant, {all_ties - agreed:,} at odds"


def _rate(figure: Figure | None) -> Rate | None:
    if figure is None:
        return None
    place, low, high = (
        round(100 * min(max(value, 0.0), 1.0), 2) for value in (figure.value, figure.low, figure.high)
    )
    return Rate(number(figure.value), interval(figure.low, figure.high), place, low, high)


def _reading(a: str, b: str, raw: Figure | None, controlled: Figure | None) -> str:
    """A sentence on whether the intervals exclude 0.5."""
    if not (raw and controlled):
        return "No verdict could be read."
    if raw.n < FEW_CASES:
        return f"n = {raw.n}: too few to prefer either."
    as_judged, at_equal_length = (_preferred(a, b, figure) for figure in (raw, controlled))
    if as_judged == at_equal_length:
        if as_judged is None:
            return "Not distinguishable: the interval includes 0.5, at equal length too."
        return _capitalised(f"{as_judged} is preferred: the interval excludes 0.5, at equal length too.")
    if as_judged is None:
        return f"The interval includes 0.5; at equal length it excludes it: {at_equal_length} is preferred."
    if at_equal_length is None:
        return _capitalised(
            f"{as_judged} is preferred: the interval excludes 0.5. At equal length it includes it, so the "
            "preference may be for length."
        )
    return _capitalised(f"{as_judged} is preferred as they stand, at equal length {at_equal_length}.")


def _preferred(a: str, b: str, figure: Figure) -> str | None:
    if figure.low > 0.5:
        return a
    return b if figure.high < 0.5 else None


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
