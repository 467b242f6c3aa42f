"""Rows in tokens, and which of them make up the batch of a step."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from gadfly.chat_template import Renderer
from gadfly.data.dataset import BadRow
from gadfly.errors import DataError, UserError
from gadfly.groups import Branch, Group, teacher_group
from gadfly.records import Row, TeacherResponse
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A prompt with its teacher responses, as text and as tokens of the student."""

    row: Row
    group: Group


def tokenise(run: Run, name: str, rows: Sequence[Row], renderer: Renderer) -> list[Example]:
    """Rows in tokens. What does not fit is listed among the bad rows of the set `name`.

    A prompt over the cap is dropped, never cut. A response over the cap is cut and becomes unfinished, or is
    dropped if `data.over_long_responses` says so (in a test set it is kept: nothing is trained on it).

    Raises:
        DataError: if no row is left.
    """
    max_prompt, max_response = run.recipe.sampling.max_prompt_tokens, run.recipe.sampling.max_response_tokens
    drops_responses = run.recipe.data.over_long_responses == "drop" and name in ("train", "valid")
    kept: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        group = teacher_group(row, renderer, max_response, run.recipe.data.teachers)
        length = len(group.prompt_tokens)
        if length > max_prompt:
            detail = f"{length} tokens, sampling.max_prompt_tokens = {max_prompt}"
            bad.append(BadRow(row.source, row.line, "over-long-prompt", detail))
            continue
        if drops_responses:
            whole = whole_teachers(group, row, renderer)
            detail = f"over sampling.max_response_tokens = {max_response}"
            num_cut = len(group.teachers) - len(whole)
            bad += [BadRow(row.source, row.line, "over-long-response", detail)] * num_cut
            group = replace(group, teachers=whole)
        if group.teachers or not row.responses:
            kept.append(Example(row, group))
    run.note_bad_rows(name, bad, len(kept))
    if name == "train" and not drops_responses:
        _warn_of_cuts(kept, renderer, max_response)
    if not kept:
        raise DataError(
            f"data.{name}: none of {len(rows)} rows fits into sampling.max_prompt_tokens = {max_prompt} "
            f"and max_response_tokens = {max_response}; raise them"
        )
    return kept


def whole_teachers(group: Group, row: Row, renderer: Renderer) -> tuple[Branch, ...]:
    """The teacher's branches that `teacher_group` did not cut at the cap, in order.

    Args:
        group: as it makes it of the row.
        row: the row.
        renderer: of the student.
    """

    def is_whole(branch: Branch, response: TeacherResponse) -> bool:
        if branch.finished or response.finished:
            return branch.finished
        # Unfinished before and after: whether it was cut too, its length says.
        return len(branch.tokens) == len(renderer.response_tokens(response.text, finished=False))

    pairs = zip(group.teachers, row.responses, strict=True)
    return tuple(branch for branch, response in pairs if is_whole(branch, response))


def _warn_of_cuts(examples: list[Example], renderer: Renderer, cap: int) -> None:
    responses = sum(len(example.group.teachers) for example in examples)
    cut = responses - sum(len(whole_teachers(each.group, each.row, renderer)) for each in examples)
    if cut:
        logger.warning(
            "data.train: %d of %d responses are cut at sampling.max_response_tokens = %d; from those the "
            "student does not learn to end",
            cut,
            responses,
            cap,
        )


def training_examples(
    run: Run, model: PreTrainedModel, renderer: Renderer
) -> tuple[list[Example], list[Example]]:
    """Training prompts, and the held-out prompts of the evaluations (none if nothing is held out).

    Raises:
        DataError: if a set has no row that fits.
        UserError: if a prompt and a response together exceed what the model can attend to.
    """
    train = tokenise(run, "train", run.data.train, renderer)
    valid = tokenise(run, "valid", run.data.valid, renderer) if run.data.valid else []
    valid = valid[: run.recipe.evaluation.prompts]
    groups = [example.group for example in [*train, *valid]]
    check_context(model, groups, run.recipe.sampling.max_response_tokens)
    return train, valid


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model can attend to; None if its config does not say."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # One text beyond these changes what is computed of every shorter one beside it.
        return int(rope["original_max_position_embeddings"])
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def check_context(
    model: PreTrainedModel, groups: Iterable[Group], max_response_tokens: int, role: str = "student"
) -> None:
    """Refuse prompts and responses that together exceed what the model can attend to, in one way for all.

    Args:
        model: what reads them.
        groups: in its tokens.
        max_response_tokens: of what will be sampled.
        role: the model's, for the error.

    Raises:
        UserError: naming the lengths.
    """
    context = positions_of(model)
    prompt, response = max(
        (
            (len(group.prompt_tokens), max([max_response_tokens, *(len(b.tokens) for b in group.teachers)]))
            for group in groups
        ),
        key=sum,
    )
    if context is not None and prompt + response > context:
        raise UserError(
            f"sampling: a prompt of {prompt} tokens and a response of {response} exceed the {role}'s "
            f"{context} positions; lower max_prompt_tokens or max_response_tokens"
        )


class Batches:
    """Which examples a step works on: every epoch is a new permutation, fixed by seed and stage.

    A step's batch follows from its number alone, so a resumed run needs no data position. The
    incomplete batch at the end of an epoch is left out.
    """

    def __init__(self, examples: Sequence[Example], batch_prompts: int, seed: int, stage: str):
        self._examples = examples
        self._batch_prompts = min(batch_prompts, len(examples))
        self._seed = [seed, *stage.encode()]
        self.steps_per_epoch = len(examples) // self._batch_prompts
        if self._batch_prompts < batch_prompts:
            logger.warning(
                "%s: batch_prompts = %d, but there are %d prompts",
                stage,
                batch_prompts,
                len(examples),
            )

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Steps of a stage: `max_steps` if given, else what the epochs make, at least one."""
        return max_steps if max_steps is not None else max(1, round(epochs * self.steps_per_epoch))

    def __call__(self, step: int) -> list[Example]:
        """The batch of a step, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._examples))
        start = place * self._batch_prompts
        return [self._examples[index] for index in order[start : start + self._batch_prompts]]
