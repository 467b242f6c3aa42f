"""One look at a run's data and at one student: answers side by side, and all that an audit finds in them."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gadfly.analysis.audit_answers import (
    Answer,
    Role,
    describe,
    has_control_string,
    judge_student,
    judge_surface,
    judge_teacher,
    proposed_cap,
)
from gadfly.analysis.audit_prompts import (
    find_leaks,
    judge_chosen_on,
    judge_leaks,
    judge_prompts,
    pairing,
)
from gadfly.analysis.surface_features import MIN_PAIRS, SurfaceTest, Written, surface_accuracy
from gadfly.chat_template import Renderer
from gadfly.errors import DataError
from gadfly.records import Row, TeacherResponse
from gadfly.stages.audit.asking import Asked, ask, by_hash
from gadfly.stages.audit.estimate import Pace
from gadfly.stages.audit.identical import score_twice
from gadfly.stages.audit.rendering import control_strings, template_findings, token_findings
from gadfly.stages.run import Run
from gadfly.statistics import share

# Pairs of nearly equal prompts that are shown.
_SHOWN = 10


@dataclass(frozen=True)
class TeacherAnswers:
    """The teacher's answers in the student's tokens, the end-of-turn token included, before any cap."""

    responses: list[TeacherResponse]
    tokens: list[list[int]]

    def answers(self, cap: int | None = None, *, drops: bool = False) -> list[Answer]:
        """The answers whole, or as they are trained on: cut and unfinished over the cap, or left out."""
        return [
            Answer(
                Written(response.text, response.finished and (cap is None or len(ids) <= cap)),
                len(ids) if cap is None else min(len(ids), cap),
            )
            for response, ids in zip(self.responses, self.tokens, strict=True)
            if cap is None or not drops or len(ids) <= cap
        ]


def look(
    run: Run, stage: str, sets: Mapping[str, Sequence[Row]], checkpoint: Path | None, *, is_trained: bool
) -> dict[str, Any]:
    """Look at everything.

    Args:
        run: the open run.
        stage: names the samples' random numbers.
        sets: the test sets.
        checkpoint: whose student and discriminator are looked at; without one, the untrained.
        is_trained: whether what the student does is held against it.

    Returns:
        A part of `audit.json`.
    """
    cap, drops = run.recipe.sampling.max_response_tokens, run.recipe.data.over_long_responses == "drop"
    asked = ask(run, stage, checkpoint / "student" if checkpoint else run.recipe.student.model)
    # The student's weights make room for the discriminator's.
    gc.collect()
    renderer, strings = asked.renderer, control_strings(asked.renderer)
    rows = by_hash(run.data.train)[: run.recipe.audit.rows]
    teacher_answers = _tokenise_answers(rows, renderer)
    trained_on = teacher_answers.answers(cap, drops=drops)
    if not trained_on:
        raise DataError(f"{stage}: no answer fits into sampling.max_response_tokens = {cap}; raise it")
    teacher, as_trained = (
        describe("teacher", teacher_answers.answers(), strings),
        describe("teacher", trained_on, strings),
    )
    samples = [Answer(Written(sample.text, sample.finished), len(sample.tokens)) for sample in asked.samples]
    student = describe("student", samples, strings)
    over_cap = share([len(ids) > cap for ids in teacher_answers.tokens])
    surface = _surface(asked)
    leaks = find_leaks(run.data.train, {**sets, "valid": run.data.valid})
    chosen_on = find_leaks(run.data.valid, sets)
    twice = score_twice(run, checkpoint, renderer, [e.row for e in asked.examples], asked.samples)
    findings = [
        *template_findings(renderer),
        *token_findings(renderer, teacher_answers.responses, teacher_answers.tokens),
        *judge_teacher(teacher, student, over_cap, drops=drops),
        *judge_student(as_trained, student, is_trained=is_trained),
        *twice.findings(),
        *_prompt_findings(run, renderer, rows, strings),
        *judge_leaks(leaks),
        *judge_chosen_on(chosen_on),
        *judge_surface(surface, is_trained=is_trained),
    ]
    return {
        "trained": is_trained,
        "roles": {role.name: role.as_record() for role in (teacher, student)},
        "cap": {
            "now": cap,
            "cuts": over_cap.as_record(),
            "proposed": proposed_cap(teacher.quantiles),
            "proposed_cuts": share(
                [len(ids) > proposed_cap(teacher.quantiles) for ids in teacher_answers.tokens]
            ).as_record(),
        },
        "surface": _surface_record(surface),
        "identical_text": {"texts": twice.texts, "different": twice.different, "largest": twice.largest},
        "leaks": [leak.as_record(_SHOWN) for leak in leaks],
        "test_in_valid": [leak.as_record(_SHOWN) for leak in chosen_on],
        "pace": asdict(_pace(asked, as_trained, student, twice.tokens_per_second)),
        "findings": [finding.as_record() for finding in findings],
    }


def _tokenise_answers(rows: Sequence[Row], renderer: Renderer) -> TeacherAnswers:
    responses = [response for row in rows for response in row.responses]
    texts, finished = [r.text for r in responses], [r.finished for r in responses]
    return TeacherAnswers(responses, renderer.batch_response_tokens(texts, finished))


def _pace(asked: Asked, teacher: Role, student: Role, read: float) -> Pace:
    prompts = [len(example.group.prompt_tokens) for example in asked.examples]
    return Pace(
        sampled=asked.tokens_per_second,
        read=read,
        prompt_tokens=sum(prompts) / len(prompts),
        teacher_tokens=teacher.figures["tokens"].value,
        student_tokens=student.figures["tokens"].value,
    )


def _prompt_findings(run: Run, renderer: Renderer, rows: Sequence[Row], strings: frozenset[str]) -> list[Any]:
    cap = run.recipe.sampling.max_prompt_tokens
    return judge_prompts(
        pairing([(row.prompt, row.responses[0].text) for row in rows]),
        over_long=share([len(renderer.prompt_tokens(row.messages)) > cap for row in rows]),
        controlling=share(
            [any(has_control_string(m.content, strings, only_own=True) for m in row.messages) for row in rows]
        ),
    )


def _surface(asked: Asked) -> SurfaceTest | None:
    """How well the surface tells sample and answer apart, the latter as the discriminator gets it."""
    pairs = [
        (Written(answer.text, answer.finished), Written(sample.text, sample.finished))
        for answer, sample in zip((e.group.teachers[0] for e in asked.examples), asked.samples, strict=True)
    ]
    return surface_accuracy(pairs) if len(pairs) >= MIN_PAIRS else None


def _surface_record(surface: SurfaceTest | None) -> dict[str, Any] | None:
    if surface is None:
        return None
    return {"accuracy": surface.accuracy.as_record(), "carriers": dict(surface.carriers)}
