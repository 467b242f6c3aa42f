"""Memory of a GAD step's three roles: whole models, against LoRA adapters of one frozen model.

Counted are the bytes of weights and optimisers, and at most of what a step makes besides: gradients and
activations, in micro-batches of 512 tokens. Nothing is timed, so one step is enough.
"""

from benchmarks.result import Result
from benchmarks.step_memory import step_bytes
from benchmarks.subjects import (
    QUICK,
    SMOLLM2,
    TINY,
    Shape,
    new_groups,
    new_model,
    new_renderer,
)
from gadfly.lora import SharedBase

_SHAPE = Shape(2, 4, 40, 60)
_RANK = 16
_MICRO_BATCH_TOKENS = 512
_NAME = "base"
_FIGURE = 0.0
CASES = ("",)


def run(case: str, quick: bool) -> Result:
    """Count both ways."""
    size, shape = (TINY, QUICK) if quick else (SMOLLM2, _SHAPE)
    groups = new_groups(shape, size)
    whole_kept, whole_made = step_bytes(
        [new_model(size, shares_prompts=True) for _ in range(3)], groups, _MICRO_BATCH_TOKENS
    )
    base = SharedBase(
        new_model(size, shares_prompts=True), new_renderer(size), _NAME, rank=_RANK, alpha=2 * _RANK, seed=0
    )
    kept, made = step_bytes([base.language_model(_NAME) for _ in range(3)], groups, _MICRO_BATCH_TOKENS)
    ratio = (whole_kept + whole_made) / (kept + made)
    mega = [f"{count / 2**20:,.0f}" for count in (kept, made, whole_kept, whole_made)]
    details = (
        f"rank {_RANK}: {mega[0]} MiB of weights and optimisers and {mega[1]} of what a step makes, "
        f"against {mega[2]} and {mega[3]}"
    )
    return Result("roles", ratio, ratio, ratio, _FIGURE, details)
