"""Peak memory of the student's update: log-probabilities in chunks, against all logits at once.

Counted are the bytes of tensors alive at once that the update makes; weights and gradients are there before.
Nothing is timed, so one pass is enough. Up to a chunk of logits (64 MB) both ways are the same.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.result import Result
from benchmarks.subjects import MIDDLE, QUICK, TEMPERATURE, TINY, Shape, Size, new_groups, new_model
from gadfly.config import Optimizer
from gadfly.config.recipe import EngineConfig
from gadfly.engine import Engine
from gadfly.groups import Group
from gadfly.logprobs import LogprobReader
from gadfly.objectives import grpo_objective

_VOCABULARIES = {"8k": 8_192, "50k": 49_152, "150k": 151_936}
_SHAPE = Shape(2, 8, 64, 128)
_FIGURE = 0.0
CASES = tuple(_VOCABULARIES)


def run(case: str, quick: bool) -> Result:
    """Count with one of the vocabularies."""
    size, shape = (TINY, QUICK) if quick else (replace(MIDDLE, vocabulary=_VOCABULARIES[case]), _SHAPE)
    groups = [group.only_students() for group in new_groups(shape, size)]
    plain, ours = (peak_bytes(_update(size, groups, is_chunked=chunked)) for chunked in (False, True))
    ratio = plain / ours
    details = f"{ours / 2**20:,.0f} MiB against {plain / 2**20:,.0f} MiB, {size.vocabulary:,} words"
    return Result(f"memory:{case}", ratio, ratio, ratio, _FIGURE, details)


def _update(size: Size, groups: list[Group], *, is_chunked: bool) -> Callable[[], object]:
    engine = Engine(
        new_model(size, shares_prompts=True),
        LogprobReader(TEMPERATURE, is_chunked=is_chunked),
        micro_batch_tokens=EngineConfig().micro_batch_tokens,
        optimizer=Optimizer(),
    )
    advantages = torch.linspace(-1, 1, sum(len(group.students) for group in groups))
    objective = grpo_objective(groups, advantages, None, clip_range=0.2, kl_coefficient=0.0)
    engine.forward_backward(groups, objective)
    return lambda: engine.forward_backward(groups, objective)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes alive at once of the tensors that a piece of work makes."""
    with _Counting() as counting:
        work()
    return counting.peak


class _Counting(TorchDispatchMode):
    """Adds up the memory of what operations return, from when it is made to when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given | self._known:
                self._known.add(key)
                self._alive += size
                self.peak = max(self.peak, self._alive)
                weakref.finalize(storage, self._let_go, key, size)
        return made

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
