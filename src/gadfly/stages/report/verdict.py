"""What may be said of GAD and SeqKD on one test set: a sentence made from the figures, and its caveats."""

from dataclasses import dataclass
from typing import Literal

from gadfly.stages.report.deciding import FEW_CASES, Figures, main_figure, rival_of_gad
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.remarks.judging import weaknesses
from gadfly.stages.report.wording import figure_label, listed, model_label, number, spoken, with_interval
from gadfly.statistics import Figure

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


def verdict_on(evidence: Evidence, test_set: str) -> Verdict:
    """GAD against SeqKD, at equal time where that can be compared."""
    figures = evidence.figures_of(test_set)
    main = main_figure(figures)
    rival = rival_of_gad(figures, main)
    if main is None or (absent := _without(figures, main, "gad", rival)):
        why = f"{listed(absent)} not in the table" if main else "no figure to compare by"
        return Verdict("no comparison", False, f"GAD and SeqKD cannot be compared here: {why}.")
    ours, theirs = figures["gad"][main], figures[rival][main]
    outcome = _compare(ours, theirs)
    said = f"in {figure_label(main)}: {with_interval(ours)} against {with_interval(theirs)}"
    if outcome == "not distinguishable":
        sentence = f"GAD and {spoken(rival)} are not distinguishable {said}. The 95 % intervals overlap."
    else:
        sentence = f"GAD is {outcome} {spoken(rival)} {said}. The 95 % intervals do not overlap."
    missing = _missing_for_a_claim(figures, main, rival) if outcome == "above" else []
    weak = weaknesses(evidence, test_set) if main == "judge_score" else []
    is_gain = outcome == "above" and not missing
    return Verdict(outcome, is_gain, sentence, (*missing, *weak, *_lengths(figures, rival)))


def _without(figures: Figures, main: str, *models: str) -> list[str]:
    return [model_label(name) for name in models if main not in figures.get(name, {})]


def _compare(ours: Figure, theirs: Figure) -> Outcome:
    if ours.low > theirs.high:
        return "above"
    return "below" if ours.high < theirs.low else "not distinguishable"


def _missing_for_a_claim(figures: Figures, main: str, rival: str) -> list[str]:
    """Why a higher figure is no gain yet, a sentence each."""
    reasons = []
    if absent := _without(figures, main, "base", "seqkd-equal-time"):
        reasons.append(f"This is no claim of a gain: {listed(absent)} not in the table.")
    elif _compare(figures["gad"][main], figures["base"][main]) != "above":
        reasons.append("This is no claim of a gain: GAD is not above the base model.")
    if main == "judge_score":
        fewest = min(figures[model][main].n for model in ("gad", rival))
        if fewest < FEW_CASES:
            reasons.append(
                f"This is no claim of a gain: only {fewest} prompts were judged; {FEW_CASES} are needed."
            )
    if main == "rouge_l":
        reasons.append(
            "ROUGE-L is a diagnostic: it says how close the wording is to the teacher's, not which "
            "answer is better."
        )
    return reasons


def _lengths(figures: Figures, rival: str) -> list[str]:
    lengths = [figures[model].get("response_tokens") for model in ("gad", rival)]
    if None in lengths:
        return ["Their lengths are not known, so part of the difference may be length."]
    ours, theirs = (number(figure.value) for figure in lengths if figure)
    return [f"Mean length: {ours} tokens against {theirs}."]
