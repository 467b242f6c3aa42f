"""`score`: the paper's protocol. Each answer is scored beside the judge's own answer to the same prompt."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gadfly.run_folder import Record
from gadfly.stages.judge.answer_sheets import AnswerSheet
from gadfly.stages.judge.bench import Bench
from gadfly.stages.judge.judge_prompt import after_reasoning, load_prompt
from gadfly.stages.judge.score_protocol import (
    JudgeScores,
    ScoredPrompt,
    mean_of_ratios,
    num_unparsable,
    ratio_of_means,
    read_scores,
)
from gadfly.stages.run import Run
from gadfly.statistics import Figure


class _Place(NamedTuple):
    model: str
    id: str
    student_first: bool


def score(run: Run, sheet: AnswerSheet) -> tuple[dict[str, dict[str, Figure]], list[Record], Record]:
    """Score every model's answers to a test set.

    Returns:
        The figures of each model, the verdicts as rows, and what is noted of these: by model, how many
        prompts could not be read and which place was given more how often; the scores, if all are the same.

    Raises:
        ConfigError: no judge is named, or its prompt file is wrong.
        ApiError: the judge cannot be asked, or left questions unanswered.
    """
    bench, config = Bench(run, "score"), run.recipe.judge
    prompt = load_prompt(config.score_prompt or "score")
    cap = config.reference_max_tokens or (
        run.recipe.generate.max_response_tokens or run.recipe.sampling.max_response_tokens
    )
    label = f"judge {sheet.name}"
    answered = {row.id: row for model in sheet.judged for row in sheet.answered_by(model)}
    own = {id_: bench.own_answer(row.messages, cap) for id_, row in answered.items()}
    written = bench.ask(f"{label} references", own)
    references = {id_: after_reasoning(row["response"]).strip() for id_, row in written.items()}
    orders = (True, False) if config.both_orders else (False,)

    cases = {}
    for model in sheet.judged:
        for row in sheet.answered_by(model):
            # Beside no answer every student would look good.
            for student_first in orders if references[row.id] else ():
                pair = (sheet.answers[model][row.id], references[row.id])
                first, second = pair if student_first else reversed(pair)
                place = _Place(model, row.id, student_first)
                cases[place] = prompt.fill(prompt=row.prompt, first=first, second=second)
    verdicts, texts = bench.verdicts(
        f"{label} score", cases, lambda place, text: read_scores(text, student_first=place.student_first)
    )
    rows = [_row(place, scores, texts[place], references[place.id]) for place, scores in verdicts.items()]
    scored = {
        model: [
            ScoredPrompt(row.id, tuple(verdicts.get(_Place(model, row.id, order)) for order in orders))
            for row in sheet.answered_by(model)
        ]
        for model in sheet.judged
    }
    figures = {model: _figures(prompts) for model, prompts in scored.items()}
    return figures, rows, _noted(scored, orders)


def _figures(prompts: Sequence[ScoredPrompt]) -> dict[str, Figure]:
    if num_unparsable(prompts) == len(prompts):
        return {}
    return {"judge_score": mean_of_ratios(prompts), "judge_score_of_means": ratio_of_means(prompts)}


def _noted(scored: Mapping[str, Sequence[ScoredPrompt]], orders: Sequence[bool]) -> Record:
    shown = {model: _as_shown(prompts, orders) for model, prompts in scored.items()}
    different = {pair for pairs in shown.values() for pair in pairs}
    return {
        "unparsable": {model: num_unparsable(prompts) for model, prompts in scored.items()},
        "named": {model: _named(pairs) for model, pairs in shown.items()},
        "same_scores": list(different.pop()) if len(different) == 1 else None,
    }


def _as_shown(prompts: Sequence[ScoredPrompt], orders: Sequence[bool]) -> list[tuple[float, float]]:
    """The scores of the first and the second answer in each verdict that counts."""
    return [
        (scores.student, scores.reference) if student_first else (scores.reference, scores.student)
        for prompt in prompts
        if prompt.parsed
        for student_first, scores in zip(orders, prompt.parsed, strict=True)
    ]


def _named(pairs: Sequence[tuple[float, float]]) -> dict[str, int]:
    """How many verdicts gave more to the first answer, how many to the second, how many as much to both."""
    signs = Counter((first > second) - (first < second) for first, second in pairs)
    return {"first": signs[1], "second": signs[-1], "tie": signs[0]}


def _row(place: _Place, scores: JudgeScores | None, text: str, reference: str) -> Record:
    return {
        "method": "score",
        "model": place.model,
        "id": place.id,
        "student_first": place.student_first,
        "student": scores and scores.student,
        "reference": scores and scores.reference,
        "verdict": text,
        "reference_response": reference,
    }
