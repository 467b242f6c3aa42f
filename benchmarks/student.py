"""The student's update with the reference's pass: prompts shared, against the same engine on padded rows.

The rival is what every model gets that does not go through transformers' attention interface.
"""

from collections.abc import Callable

import torch

from benchmarks.result import Result, time_in_turn
from benchmarks.subjects import MIDDLE, QUICK, TEMPERATURE, TINY, Shape, Size, new_groups, new_model
from benchmarks.token_counts import in_words, student_bound
from gadfly.config import Optimizer
from gadfly.config.recipe import EngineConfig
from gadfly.engine import Engine
from gadfly.groups import Group
from gadfly.logprobs import LogprobReader
from gadfly.objectives import grpo_objective

_SHAPES = {
    "64/128": Shape(4, 8, 64, 128),
    "64/256": Shape(4, 8, 64, 256),
    "1024/256": Shape(2, 8, 1024, 256),
}
_SHARE_OF_BOUND = 0.85
_PAIRS = 5
CASES = tuple(_SHAPES)


def run(case: str, quick: bool) -> Result:
    """Measure at one of the lengths."""
    size, shape, pairs = (TINY, QUICK, 1) if quick else (MIDDLE, _SHAPES[case], _PAIRS)
    groups = [group.only_students() for group in new_groups(shape, size)]
    ways = [_update(size, groups, shares_prompts=shares) for shares in (False, True)]
    bound = student_bound(shape)
    details = f"P {shape.prompts} x G {shape.group_size}, {in_words(bound, student_bound(shape, size))}"
    return Result.of_times(f"student:{case}", time_in_turn(pairs, *ways), _SHARE_OF_BOUND * bound, details)


def _update(size: Size, groups: list[Group], *, shares_prompts: bool) -> Callable[[], None]:
    tokens = EngineConfig().micro_batch_tokens
    read = LogprobReader(TEMPERATURE, is_chunked=True)
    student, reference = (new_model(size, shares_prompts=shares_prompts) for _ in range(2))
    trained = Engine(student, read, micro_batch_tokens=tokens, optimizer=Optimizer())
    frozen = Engine(reference, read, micro_batch_tokens=tokens)
    advantages = torch.linspace(-1, 1, sum(len(group.students) for group in groups))

    def update() -> None:
        objective = grpo_objective(
            groups, advantages, frozen.forward(groups), clip_range=0.2, kl_coefficient=0.001
        )
        trained.forward_backward(groups, objective)
        trained.clip_gradients()
        trained.step(1e-6)

    return update
