"""Memory of a GAD step's three roles: whole models, against LoRA adapters of one frozen model.

Counted are the bytes of weights and optimisers, and at most of what a step makes besides: gradients and
activations, in micro-batches of 512 tokens. Nothing is timed, so one step is enough.
"""

import gc
from itertools import chain

from torch import nn

from benchmarks.gad_step import CLIP_RANGE, KL_COEFFICIENT, LEARNING_RATE
from benchmarks.memory import peak_bytes
from benchmarks.result import Result
from benchmarks.subjects import (
    QUICK,
    SMOLLM2,
    TEMPERATURE,
    TINY,
    Shape,
    Size,
    new_groups,
    new_model,
    new_renderer,
)
from gadfly.config import Optimizer
from gadfly.discriminator import Discriminator, read_scores
from gadfly.engine import Engine
from gadfly.logprobs import LogprobReader
from gadfly.lora import SharedBase
from gadfly.losses import group_advantages
from gadfly.objectives import discriminator_objective, grpo_objective
from gadfly.stages.diagnostics import student_scores

_SHAPE = Shape(2, 4, 40, 60)
_RANK = 16
_MICRO_BATCH_TOKENS = 512
_NAME = "base"
_FIGURE = 0.0
CASES = ("",)


def run(case: str, quick: bool) -> Result:
    """Count both ways."""
    size, shape = (TINY, QUICK) if quick else (SMOLLM2, _SHAPE)
    whole_kept, whole_made = _step_bytes(
        [new_model(size, shares_prompts=True) for _ in range(3)], size, shape
    )
    base = SharedBase(
        new_model(size, shares_prompts=True), new_renderer(size), _NAME, rank=_RANK, alpha=2 * _RANK, seed=0
    )
    kept, made = _step_bytes([base.language_model(_NAME) for _ in range(3)], size, shape)
    ratio = (whole_kept + whole_made) / (kept + made)
    mega = [f"{count / 2**20:,.0f}" for count in (kept, made, whole_kept, whole_made)]
    details = (
        f"rank {_RANK}: {mega[0]} MiB of weights and optimisers and {mega[1]} of what a step makes, "
        f"against {mega[2]} and {mega[3]}"
    )
    return Result("roles", ratio, ratio, ratio, _FIGURE, details)


def _step_bytes(models: list, size: Size, shape: Shape) -> tuple[int, int]:
    """Bytes that are there between steps, and most that a step makes."""
    student, reference, discriminator = models
    read = LogprobReader(TEMPERATURE, is_chunked=True)
    writer = Engine(student, read, micro_batch_tokens=_MICRO_BATCH_TOKENS, optimizer=Optimizer())
    frozen = Engine(reference, read, micro_batch_tokens=_MICRO_BATCH_TOKENS)
    scorer = Engine(
        Discriminator(discriminator.base_model, seed=0),
        read_scores,
        micro_batch_tokens=_MICRO_BATCH_TOKENS,
        optimizer=Optimizer(),
    )
    groups = new_groups(shape, size)
    students = [group.only_students() for group in groups]

    def step() -> None:
        scores, _ = scorer.forward_backward(groups, discriminator_objective(groups, "bradley_terry"))
        advantages = group_advantages(student_scores(scores, groups)).flatten()
        objective = grpo_objective(
            students,
            advantages,
            frozen.forward(students),
            clip_range=CLIP_RANGE,
            kl_coefficient=KL_COEFFICIENT,
        )
        writer.forward_backward(students, objective)
        for engine in (scorer, writer):
            engine.clip_gradients()
            engine.step(LEARNING_RATE)

    step()
    gc.collect()
    made = peak_bytes(step)
    modules: list[nn.Module] = [student, reference, scorer.model]
    tensors = chain(
        *(chain(module.parameters(), module.buffers()) for module in modules),
        *(engine.optimizer_state().values() for engine in (writer, scorer)),
    )
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(kept.values()), made
