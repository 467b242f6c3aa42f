"""Rows in tokens, and which of them make up the batch of a step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from gadfly.chat_template import Renderer
from gadfly.data.dataset import BadRow
from gadfly.errors import DataError, UserError
from gadfly.groups import Group, teacher_group
from gadfly.records import Row
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
            pairs = zip(group.teachers, row.responses, strict=True)
            whole = tuple(branch for branch, response in pairs if branch.finished == response.finished)
            detail = f"over sampling.max_response_tokens = {max_response}"
            num_cut = len(group.teachers) - len(whole)
            bad += [BadRow(row.source, row.line, "over-long-response", detail)] * num_cut
            group = replace(group, teachers=whole)
        if group.teachers or not row.responses:
            kept.append(Example(row, group))
    run.note_bad_rows(name, bad, len(kept))
    responses = [(b, r) for e in kept for b, r in zip(e.group.teachers, e.row.responses, strict=False)]
    cut = sum(branch.finished != response.finished for branch, response in responses)
    if cut and name == "train":
        logger.warning(
            "data.train: %d of %d responses are cut at sampling.max_response_tokens = %d; from those the "
            "student does not learn to end",
            cut,
            len(responses),
            max_response,
        )
    if not kept:
        raise DataError(
            f"data.{name}: none of {len(rows)} rows fits into sampling.max_prompt_tokens = {max_prompt} "
            f"and max_response_tokens = {max_response}; raise them"
        )
    return kept


def training_examples(
    run: Run, model: PreTrainedModel, renderer: Renderer
) -> tuple[list[Example], list[Example]]:
    """Training prompts, and the held-out prompts of the evaluations (none if nothing is held out).

    Raises:
        DataError: if a set has no row that fits.
        UserError: if a prompt and a response together exceed what the model can attend to.
    """
    train = tokenise(run, "train", run.data.train, renderer)
    check_context(model, train, run.recipe.sampling.max_response_tokens)
    if not run.data.valid:
        return train, []
    return train, tokenise(run, "valid", run.data.valid, renderer)[: run.recipe.evaluation.prompts]


def check_context(model: PreTrainedModel, examples: Sequence[Example], max_response_tokens: int) -> None:
    """Refuse prompts and responses that together exceed what the model can attend to, in one way for all.

    Raises:
        UserError: naming the lengths.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # One text beyond these changes what is computed of every shorter one beside it.
        context = rope["original_max_position_embeddings"]
    longest = max(len(example.group.prompt_tokens) for example in examples)
    if context is not None and longest + max_response_tokens > context:
        raise UserError(
            f"sampling: the longest prompt ({longest} tokens) and max_response_tokens = "
            f"{max_response_tokens} exceed the model's {context} positions; lower one of the two caps"
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
