"""Memory of a GAD step: bytes that are there between steps, and most that a step makes besides."""

import gc
from itertools import chain

from torch import nn
from transformers import PreTrainedModel

from benchmarks.gad_step import CLIP_RANGE, KL_COEFFICIENT, LEARNING_RATE
from benchmarks.memory import peak_bytes
from benchmarks.subjects import TEMPERATURE
from gadfly.config import Optimizer
from gadfly.discriminator import Discriminator, read_scores
from gadfly.engine import Engine
from gadfly.groups import Group
from gadfly.logprobs import LogprobReader
from gadfly.losses import group_advantages
from gadfly.objectives import discriminator_objective, grpo_objective
from gadfly.stages.diagnostics import student_scores


def step_bytes(
    models: list[PreTrainedModel],
    groups: list[Group],
    micro_batch_tokens: int,
    *,
    recomputes: bool = False,
) -> tuple[int, int]:
    """Of weights and optimisers, and of a step as `stages/gad.py` makes it of responses that are there.

    Args:
        models: student, reference and discriminator, as language models.
        groups: with teacher and student branches.
        micro_batch_tokens: tokens in one pass.
        recomputes: whether activations are computed again in the backward pass.
    """
    student, reference, discriminator = models
    read = LogprobReader(TEMPERATURE, is_chunked=True)
    writer = Engine(
        student, read, micro_batch_tokens=micro_batch_tokens, optimizer=Optimizer(), recomputes=recomputes
    )
    frozen = Engine(reference, read, micro_batch_tokens=micro_batch_tokens)
    scorer = Engine(
        Discriminator(discriminator.base_model, seed=0),
        read_scores,
        micro_batch_tokens=micro_batch_tokens,
        optimizer=Optimizer(),
        recomputes=recomputes,
    )
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
        for engine in (scorer, writer):
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
