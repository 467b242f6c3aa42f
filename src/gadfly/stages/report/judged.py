"""How a test set was judged, and how well the models are told from the teacher, in sentences."""

from gadfly.stages.report.deciding import Figures
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.wording import listed, percent, spoken
from gadfly.statistics import Figure

# Whose answers the sentence is about: the first two of these.
_MODELS = ("gad", "seqkd-equal-time", "seqkd", "base")


def judge_words(evidence: Evidence, test_set: str) -> str:
    """Who judged and in which orders; empty where no model was asked.

    Each half is there only if that method has been used.
    """
    noted = evidence.judge.get(test_set, {})
    if "judge" not in noted:
        return ""
    how = []
    if "both_orders" in noted:
        orders = (
            "in both orders" if noted["both_orders"] else "in one order only, the student's answer second"
        )
        how.append(f"scores {orders}")
    if evidence.pairwise.get(test_set):
        how.append("pairs in both orders, where a win needs both")
    return f"The judge is {noted['judge']}: {listed(how)}." if how else f"The judge is {noted['judge']}."


def tell_words(figures: Figures) -> str:
    """How often an independent classifier tells the models' answers from the teacher's; empty if unknown."""
    models = [model for model in _MODELS if "tell_accuracy" in figures.get(model, {})][:2]
    if not models:
        return ""
    first, *others = models
    shares = [_share(figures[model]["tell_accuracy"]) for model in models]
    rest = [f", those of {spoken(model)} in {share}" for model, share in zip(others, shares[1:], strict=True)]
    sentence = (
        f"An independent classifier tells {spoken(first)}'s answers from the teacher's in {shares[0]} of "
        f"cases{''.join(rest)}; {percent(0.5)} is chance, and the goal."
    )
    same_length = [figures[model].get("tell_accuracy_same_length") for model in models]
    trimmed = [_share(figure) for figure in same_length if figure]
    if len(trimmed) < len(models):
        return sentence
    return f"{sentence} Cut to the same length: {listed(trimmed)}."


def _share(figure: Figure) -> str:
    n = f"n\u00a0=\u00a0{figure.n:,}"
    if figure.low < 0 or figure.high > 1:
        return f"{percent(figure.value)} (no interval, {n})"
    return f"{percent(figure.value)} ({100 * figure.low:.0f}–{100 * figure.high:.0f}, {n})"  # noqa: RUF001
