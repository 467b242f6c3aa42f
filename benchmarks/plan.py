"""The memory plan's formula against what a step takes: how near predicted and measured bytes are.

Measured are bytes of tensors alive at most in a gad step on one process without sampling, weights and
AdamW's moments included, of Llamas in random weights; predicted is the plan of their configs. The ratio is
the smaller of the two by the larger. Nothing is timed, so one step is enough.
"""

from benchmarks.result import Result
from benchmarks.step_memory import step_bytes
from benchmarks.subjects import (
    QUICK,
    SMOLLM2,
    TINY,
    Shape,
    Size,
    new_groups,
    new_model,
    new_renderer,
)
from gadfly.lora import SharedBase
from gadfly.sizing.memory_plan import Workload, plan_memory
from gadfly.sizing.model_shape import shape_of

_SIZES = {
    "5M": Size(hidden=128, intermediate=384, layers=4, heads=4, key_heads=2, vocabulary=32768),
    "30M": Size(hidden=384, intermediate=1024, layers=10, heads=6, key_heads=2, vocabulary=32768),
    "135M": SMOLLM2,
}
# Lengths that the groups of both updates fill a micro-batch with, the student's twice.
_SHAPE = Shape(prompts=14, group_size=4, prompt_tokens=40, response_tokens=20)
_MICRO_BATCH_TOKENS = 840
# And longer ones, each group a micro-batch of its own: attention is a greater part.
_LONG = Shape(prompts=3, group_size=4, prompt_tokens=256, response_tokens=128)
_RANK = 16
_NAME = "base"
# One by 1.1: within a tenth.
_WANTED = 0.91
CASES = tuple(f"{size}{kind}" for size in _SIZES for kind in ("", "-lora", "-recomputed", "-long"))


def run(case: str, quick: bool) -> Result:
    """Predict and count: every weight trained, adapters, activations computed again, or longer texts."""
    name, _, kind = case.partition("-")
    size, shape = (TINY, QUICK) if quick else (_SIZES[name], _LONG if kind == "long" else _SHAPE)
    predicted, measured = predicted_and_measured(
        size, shape, _RANK if kind == "lora" else 0, recomputes=kind == "recomputed"
    )
    ratio = measured / predicted
    nearness = min(ratio, 1 / ratio)
    details = (
        f"measured {measured / 2**20:,.0f} MiB, predicted {predicted / 2**20:,.0f} MiB, "
        f"measured / predicted {ratio:.3f}"
    )
    return Result(f"plan:{case}", nearness, nearness, nearness, _WANTED, details)


def predicted_and_measured(size: Size, shape: Shape, rank: int, *, recomputes: bool) -> tuple[float, int]:
    """Bytes at most in a step, by the formula and as counted."""
    models = [new_model(size, shares_prompts=True) for _ in range(1 if rank else 3)]
    model_shape = shape_of(models[0].config)
    work = Workload(
        model_shape,
        model_shape,
        lora_rank=rank,
        is_checkpointed=recomputes,
        batch_prompts=shape.prompts,
        group_size=shape.group_size,
        prompt_tokens=shape.prompt_tokens,
        response_tokens=shape.response_tokens,
        micro_batch_tokens=_MICRO_BATCH_TOKENS,
        is_flex=False,
    )
    if rank:
        base = SharedBase(models[0], new_renderer(size), _NAME, rank=rank, alpha=rank, seed=0)
        models = [base.language_model(_NAME) for _ in range(3)]
    groups = new_groups(shape, size)
    kept, made = step_bytes(models, groups, work.micro_batch_tokens, recomputes=recomputes)
    plan = plan_memory(work)
    updates = ("discriminator's update", "student's update")
    return max(plan.phases[update] for update in updates), kept + made
