"""The student's fresh samples beside the teacher's answers to the same prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gadfly.chat_template import Renderer
from gadfly.data.dataset import prompt_hash_fraction
from gadfly.errors import DataError
from gadfly.groups import Branch, Group, teacher_group
from gadfly.records import Row
from gadfly.stages.examples import Example, check_context, whole_teachers
from gadfly.stages.roles import Writer, open_writer
from gadfly.stages.rollout import sample_groups
from gadfly.stages.run import Run

# Seconds of sampling after which it is not done again to be measured.
_LONG = 3.0


@dataclass(frozen=True)
class Asked:
    """What a student answered, and what the teacher had.

    Attributes:
        renderer: the student's.
        examples: prompts, held-out ones first, each with the teacher's answer as it is trained on.
        samples: one to each prompt.
        tokens_per_second: drawn, all prompts at once.
    """

    renderer: Renderer
    examples: list[Example]
    samples: list[Branch]
    tokens_per_second: float


def by_hash(rows: Sequence[Row]) -> list[Row]:
    """Rows in an order that follows from their prompts alone: any number of the first is a fair sample."""
    return sorted(rows, key=lambda row: prompt_hash_fraction(row.messages))


def ask(run: Run, stage: str, source: str | Path) -> Asked:
    """Ask the student of a model folder some prompts, as in training.

    Raises:
        DataError: if no prompt with an answer fits into the caps.
        UserError: if prompt and answer together exceed what the model can attend to.
    """
    sampling = run.recipe.sampling
    writer = open_writer(run, source)
    examples: list[Example] = []
    for row in [*by_hash(run.data.valid), *by_hash(run.data.train)]:
        if len(examples) == run.recipe.audit.prompts:
            break
        group = teacher_group(row, writer.renderer, sampling.max_response_tokens)
        group = replace(group, teachers=_trained_on(run, row, group, writer.renderer))
        if group.teachers and len(group.prompt_tokens) <= sampling.max_prompt_tokens:
            examples.append(Example(row, group))
    if not examples:
        raise DataError(
            f"{stage}: no prompt with its answer fits into sampling.max_prompt_tokens = "
            f"{sampling.max_prompt_tokens} and max_response_tokens = {sampling.max_response_tokens}; "
            f"raise them"
        )
    check_context(writer.model, [example.group for example in examples], sampling.max_response_tokens)
    # What is done for the first time takes longer than all later times.
    _samples(run, stage, writer, examples[:1], cap=1)
    started = time.perf_counter()
    samples = _samples(run, stage, writer, examples, cap=sampling.max_response_tokens)
    seconds = time.perf_counter() - started
    drawn = sum(len(sample.tokens) for sample in samples)
    if seconds < _LONG:
        # A small model draws many more at once in hardly more time, and training asks for more.
        most = max(1, sampling.max_parallel_responses // len(examples))
        group_size = min(run.recipe.gad.group_size, most)
        started = time.perf_counter()
        many = _samples(run, stage, writer, examples, cap=sampling.max_response_tokens, group_size=group_size)
        seconds = time.perf_counter() - started
        drawn = sum(len(sample.tokens) for sample in many)
    return Asked(writer.renderer, examples, samples, drawn / max(seconds, 1e-9))


def _samples(
    run: Run, stage: str, writer: Writer, examples: list[Example], *, cap: int, group_size: int = 1
) -> list[Branch]:
    groups, _ = sample_groups(
        writer.sampler,
        writer.renderer,
        examples,
        group_size=group_size,
        temperature=run.recipe.sampling.temperature,
        max_response_tokens=cap,
        seed=run.recipe.seed,
        purpose=stage,
    )
    return [sample for group in groups for sample in group.students]


def _trained_on(run: Run, row: Row, group: Group, renderer: Renderer) -> tuple[Branch, ...]:
    is_cut = run.recipe.data.over_long_responses == "cut"
    return group.teachers if is_cut else whole_teachers(group, row, renderer)
