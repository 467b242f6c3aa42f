"""Answers to read side by side: before and after training, model against model, best and worst."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gadfly.run_folder import Record
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.wording import model_label, number

# Prompts shown of the first test set, and of each further one.
_PROMPTS_FIRST, _PROMPTS_FURTHER = 4, 2

# Models whose answers to test prompts stand beside each other.
_SIDE_BY_SIDE = ("base", "seqkd", "seqkd-equal-time", "gad")

# The first of these stages that has any answers on held-out prompts is shown before and after.
_BEFORE_AFTER = ("gad", "warmup", "seqkd")


@dataclass(frozen=True)
class Answer:
    """One text on the page, whose it is and whether it ended by itself."""

    label: str
    text: str
    finished: bool = True
    score: str = ""
    """The discriminator's, if it gave one."""
    colour: str = "other"
    """Which of the page's colours marks it: a model's name, `teacher` or `other`."""


@dataclass(frozen=True)
class Comparison:
    """One prompt and the answers to it."""

    prompt: str
    answers: tuple[Answer, ...]
    note: str = ""


@dataclass(frozen=True)
class Chapter:
    """Comparisons of one kind."""

    title: str
    comparisons: tuple[Comparison, ...]


def before_and_after(evidence: Evidence) -> Chapter | None:
    """Greedy held-out answers at the first and the last evaluation of a stage, and the teacher's."""
    for stage in _BEFORE_AFTER:
        rows = [row for row in evidence.samples if row["kind"] == "evaluation" and row["stage"] == stage]
        if rows:
            first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
            befores = {row["id"]: row for row in rows if row["step"] == first}
            afters = [row for row in rows if row["step"] == last]
            before_label = "before" if first == 0 else f"at step {first:,}"
            return Chapter(
                f"{model_label(stage)} on held-out prompts, greedy: steps {first:,} and {last:,}",
                tuple(_before_after(befores.get(row["id"]), row, stage, before_label) for row in afters),
            )
    return None


def _before_after(before: Record | None, after: Record, stage: str, before_label: str) -> Comparison:
    answers = [Answer("teacher", after["teacher"], colour="teacher")]
    if before and before["step"] != after["step"]:
        answers.append(Answer(before_label, before["response"], before["finished"], _beside_teacher(before)))
    label = f"after step {after['step']:,}" if len(answers) > 1 else f"at step {after['step']:,}"
    answers.append(Answer(label, after["response"], after["finished"], _beside_teacher(after), stage))
    return Comparison(after["prompt"], tuple(answers))


def _beside_teacher(row: Record) -> str:
    """The score of an answer and of the teacher's, by the same discriminator: scores of two steps do not
    compare.
    """
    if row.get("score") is None:
        return ""
    return f"{_score(row['score'])}; the teacher's {_score(row.get('teacher_score'))}"


def model_against_model(evidence: Evidence) -> list[Chapter]:
    """For each test set, the same prompts answered by base, SeqKD and GAD."""
    chapters: list[Chapter] = []
    for name, rows in evidence.generations.items():
        by_model: dict[str, dict[str, Record]] = {}
        for row in rows:
            by_model.setdefault(row["model"], {})[row["id"]] = row
        shown = [model for model in _SIDE_BY_SIDE if model in by_model] or list(by_model)[:3]
        common = (
            [id for id in by_model[shown[0]] if all(id in by_model[model] for model in shown)]
            if shown
            else []
        )
        picked = _spread(common, _PROMPTS_FURTHER if chapters else _PROMPTS_FIRST)
        if picked:
            chapters.append(Chapter(name, tuple(_side_by_side(by_model, shown, id) for id in picked)))
    return chapters


def _side_by_side(by_model: dict[str, dict[str, Record]], shown: Sequence[str], id: str) -> Comparison:
    answers = tuple(
        Answer(model_label(model), row["response"], row["finished"], colour=model)
        for model, row in ((model, by_model[model][id]) for model in shown)
    )
    return Comparison(by_model[shown[0]][id]["prompt"], answers)


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """`count` of the ids at even distances, the first among them."""
    step = max(1, len(ids) // count)
    return list(ids[::step][:count])


def best_and_worst(evidence: Evidence) -> list[Chapter]:
    """Groups of the first and last step GAD kept any of: best and worst beside the teacher."""
    rows = [row for row in evidence.samples if row["kind"] == "rollout" and row["stage"] == "gad"]
    steps = sorted({row["step"] for row in rows})
    return [
        Chapter(
            f"Samples of GAD's step {step:,}",
            tuple(_scored_group(row) for row in rows if row["step"] == step and row["samples"]),
        )
        for step in dict.fromkeys(steps[:1] + steps[-1:])
    ]


def _scored_group(row: Record) -> Comparison:
    ranked = sorted(row["samples"], key=lambda sample: _order(sample["score"]), reverse=True)
    answers = [Answer("teacher", row["teacher"], colour="teacher")]
    for label, sample in (("best scored", ranked[0]), ("worst scored", ranked[-1]))[: len(ranked)]:
        score = _score(sample["score"])
        answers.append(Answer(label, sample["text"], sample["finished"], score, "gad"))
    scores = ", ".join(_score(sample["score"]) for sample in ranked)
    return Comparison(row["prompt"], tuple(answers), f"all {len(ranked)} scores: {scores}")


def _order(score: float | int | None) -> float:
    return float(score) if score is not None and math.isfinite(score) else -math.inf


def _score(score: float | int | None) -> str:
    return number(float(score)) if score is not None and math.isfinite(score) else "not finite"
