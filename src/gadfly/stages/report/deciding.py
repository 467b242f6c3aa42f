"""Which figure decides between the models, whom GAD is held against, and how few cases decide nothing."""

from collections.abc import Mapping

from gadfly.statistics import Figure

Figures = Mapping[str, Mapping[str, Figure]]
"""Figures on one test set, by model and name."""

MAIN_FIGURES = ("valid_fraction", "judge_score", "rouge_l")
"""The figures that may decide, best first; all are better when higher."""

FEW_CASES = 20
"""Below as many cases chance alone makes large differences, and intervals by resampling are too narrow."""

_RIVALS = ("seqkd-equal-time", "seqkd")


def main_figure(figures: Figures) -> str | None:
    """The best figure that GAD and a baseline have; without such a pair, the best that any student has.

    Example:
        >>> main_figure({"gad": {"rouge_l": Figure(0.5, 9, 0.4, 0.6)}, "teacher": {}})
        'rouge_l'
    """
    compared = [name for name in MAIN_FIGURES if any(_have(figures, name, "gad", rival) for rival in _RIVALS)]
    students = [model for model in figures if model != "teacher"]
    known = [name for name in MAIN_FIGURES if any(_have(figures, name, model) for model in students)]
    return next(iter(compared + known), None)


def rival_of_gad(figures: Figures, main: str | None) -> str:
    """The baseline GAD is held against: the one at equal time, unless only plain SeqKD has the figure."""
    known = [rival for rival in _RIVALS if main and _have(figures, main, rival)]
    present = [rival for rival in _RIVALS if rival in figures]
    return next(iter(known + present), "seqkd")


def _have(figures: Figures, name: str, *models: str) -> bool:
    return all(name in figures.get(model, {}) for model in models)
