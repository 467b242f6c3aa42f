"""`tell`: whether an independent classifier can tell each model's answers from the teacher's."""

import logging

from gadfly.analysis.tell import MIN_PROMPTS, Embed, Pair, same_length, tell_accuracy
from gadfly.stages.judge.answer_sheets import TEACHER, AnswerSheet
from gadfly.stages.run import Run
from gadfly.statistics import Figure

logger = logging.getLogger(__name__)


def tell_figures(sheet: AnswerSheet, embed: Embed | None) -> dict[str, dict[str, Figure]]:
    """How often each model's answers are told from the teacher's; 0.5 is chance.

    Args:
        sheet: the answers, the teacher's among them.
        embed: as `embedder` gives it.

    Returns:
        Two figures a model: on the texts as they are, and with both cut to the same number of words, so that
        length gives nothing away. Nothing for a set without the teacher's responses, or with too few of them.
    """
    if TEACHER not in sheet.answers:
        logger.info("judge %s: no tell, the set has no teacher responses", sheet.name)
        return {}
    figures = {}
    for model in sheet.judged:
        if model == TEACHER:
            continue
        pairs = pairs_with_teacher(sheet, model)
        if len(pairs) < MIN_PROMPTS:
            logger.info("judge %s: no tell, %d answers are too few (%d)", sheet.name, len(pairs), MIN_PROMPTS)
            continue
        figures[model] = {
            "tell_accuracy": tell_accuracy(pairs, embed),
            "tell_accuracy_same_length": tell_accuracy(same_length(pairs), embed),
        }
    return figures


def pairs_with_teacher(sheet: AnswerSheet, model: str) -> list[Pair]:
    """A model's answers beside the teacher's, where both answered."""
    return [
        Pair(row.prompt, sheet.answers[TEACHER][row.id], sheet.answers[model][row.id])
        for row in sheet.answered_by(model, TEACHER)
    ]


def embedder(run: Run) -> Embed | None:
    """The features of `judge.tell_model`; None for the classifier's own. Opening it takes time: do it once.

    Raises:
        UserError: it cannot be opened.
    """
    if run.recipe.judge.tell_model is None:
        return None
    from gadfly.analysis.tell_model import open_embedder  # noqa: PLC0415  needs torch

    return open_embedder(run.recipe.judge.tell_model)
