"""Objects of a stage with a fault in them: a sampler, a model, a reader of scores.

Each is planted where a stage opens it, and taken out again.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadfly.chat_template import Renderer
from gadfly.discriminator import Discriminator, Probe, Scores, load_unchecked, read_scores
from gadfly.groups import Group
from gadfly.models import load_language_model
from gadfly.packing import MicroBatch
from gadfly.samplers import Sample, Sampler
from gadfly.samplers.sampler import Request
from gadfly.stages import roles
from gadfly.stages.diagnostics import Metrics
from gadfly.stages.examples import Example
from gadfly.stages.rewards import Rewards
from gadfly.stages.run import Run
from gadfly.stages.sampler_choice import open_sampler


class StaleSampler:
    """A sampler whose weights stay as they were when it was opened."""

    def __init__(self, inner: Sampler):
        self._inner = inner

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """As the inner one does."""
        return self._inner.sample(requests, temperature=temperature, max_response_tokens=max_response_tokens)

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Lose them."""


def old_weights() -> AbstractContextManager[object]:
    """The sampler is not given the student's new weights."""

    def opened(
        run: Any, source: str, engine: Any, renderer: Any, inference_copy: Any, **rest: Any
    ) -> Sampler:
        def own_copy() -> Any:
            return copy.deepcopy(inference_copy())

        return StaleSampler(open_sampler(run, source, engine, renderer, own_copy, **rest))

    return patch.object(roles, "open_sampler", opened)


def cut_off_module() -> AbstractContextManager[object]:
    """No gradient gets through the student's first layer."""
    return _students(
        lambda model: model.model.layers[0].register_forward_hook(
            lambda module, given, output: (
                output.detach() if isinstance(output, Tensor) else tuple(part.detach() for part in output)
            )
        )
    )


def spoiled_gradient(at: int) -> AbstractContextManager[object]:
    """The gradient of one of the student's weights is no number, at one step."""

    def spoil(model: Any) -> None:
        weight: nn.Parameter = model.lm_head.weight
        calls = iter(range(1, 10**6))
        weight.register_hook(lambda gradient: gradient * torch.nan if next(calls) == at else None)

    return _students(spoil)


def turned_gradient() -> AbstractContextManager[object]:
    """The discriminator is taught to score the student's samples above the teacher's."""

    def opened(*arguments: Any, **rest: Any) -> tuple[Discriminator, Renderer, Probe]:
        model, renderer, probe = load_unchecked(*arguments, **rest)
        for weight in model.parameters():
            weight.register_hook(torch.neg)
        return model, renderer, probe

    return patch.object(roles, "load_unchecked", opened)


def turning_reward(steps: int) -> AbstractContextManager[object]:
    """After so many steps what was better is worse, after as many again it is better, and so on."""

    class Turning(Rewards):
        def __init__(self, run: Run):
            super().__init__(run)
            self._calls = itertools.count()

        def __call__(
            self, scores: Tensor, batch: Sequence[Example], groups: Sequence[Group]
        ) -> tuple[Tensor, Metrics]:
            advantages, shares = super().__call__(scores, batch, groups)
            return (-advantages if next(self._calls) // steps % 2 else advantages), shares

    return patch("gadfly.stages.gad.Rewards", Turning)


def scored(read: Callable[[nn.Module, MicroBatch], Scores]) -> AbstractContextManager[object]:
    """The discriminator's scores are read by another function.

    The first reading is right: it is that of the texts stored with a checkpoint, which would be refused.
    """
    calls = iter(range(10**9))

    def reader(model: nn.Module, batch: MicroBatch) -> Scores:
        return (read if next(calls) else read_scores)(model, batch)

    return patch.object(roles, "read_scores", reader)


def in_half_precision(model: nn.Module, batch: MicroBatch) -> Scores:
    """Scores rounded to bfloat16."""
    return Scores(read_scores(model, batch).values.to(torch.bfloat16).float())


def by_length(batch: MicroBatch) -> Tensor:
    """Length is taken for quality."""
    return batch.response_lengths.float() / 10


def by_brevity(batch: MicroBatch) -> Tensor:
    """The shorter an answer, the better it is taken to be."""
    return -batch.response_lengths.float() / 10


def by_one_word(batch: MicroBatch) -> Tensor:
    """An answer is the better the more often it says its first word."""
    tokens, mask = batch.response_tokens, batch.response_mask
    same = ((tokens == tokens[:, :1]) & mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return 10 * same.float()


def prejudice(read: Callable[[MicroBatch], Tensor]) -> AbstractContextManager[object]:
    """A discriminator whose scores are next to all prejudice."""
    # What is left of its own keeps different answers from having one score.
    return scored(lambda model, batch: Scores(read(batch) + 0.01 * read_scores(model, batch).values))


@contextmanager
def _students(change: Callable[[Any], object]) -> Iterator[None]:
    """Language models are opened with a change to them."""

    def opened(*arguments: Any, **rest: Any) -> tuple[PreTrainedModel, Renderer]:
        model, renderer = load_language_model(*arguments, **rest)
        change(model)
        return model, renderer

    with patch.object(roles, "load_language_model", opened):
        yield
