"""Our side of the step benchmarks: a step as `stages/gad.py` makes it, without a run folder around it."""

from benchmarks.subjects import TEMPERATURE, Shape, Size, new_discriminator, new_model, new_renderer
from gadfly.config import Optimizer
from gadfly.discriminator import read_scores
from gadfly.engine import Engine
from gadfly.groups import reread
from gadfly.logprobs import LogprobReader, has_plain_head
from gadfly.losses import group_advantages
from gadfly.objectives import discriminator_objective, grpo_objective
from gadfly.samplers import LocalSampler, packing_dtype
from gadfly.stages.diagnostics import (
    discriminator_metrics,
    group_metrics,
    policy_metrics,
    rollout_metrics,
    student_scores,
)
from gadfly.stages.examples import Example
from gadfly.stages.rollout import sample_groups

LEARNING_RATE = 1e-6
KL_COEFFICIENT = 0.001
CLIP_RANGE = 0.2


class GadStep:
    """Student, reference and discriminator of a size, and one step after the other of a shape.

    Args:
        size: of all three.
        shape: lengths and group size.
        micro_batch_tokens: tokens in one pass.
    """

    def __init__(self, size: Size, shape: Shape, micro_batch_tokens: int):
        self._shape = shape
        self._renderer = new_renderer(size)
        student, reference = (new_model(size, shares_prompts=True) for _ in range(2))
        read = LogprobReader(TEMPERATURE, is_chunked=has_plain_head(student))
        self._student = Engine(student, read, micro_batch_tokens=micro_batch_tokens, optimizer=Optimizer())
        self._reference = Engine(reference, read, micro_batch_tokens=micro_batch_tokens)
        self._discriminator = Engine(
            new_discriminator(size, shares_prompts=True),
            read_scores,
            micro_batch_tokens=micro_batch_tokens,
            optimizer=Optimizer(),
        )
        self._sampler = LocalSampler(student, self._renderer.end_ids, copy_dtype=packing_dtype(student))
        self._step = 0

    def __call__(self, batch: list[Example]) -> None:
        """Sample, score, update both."""
        self._step += 1
        groups, samples = sample_groups(
            self._sampler,
            self._renderer,
            batch,
            group_size=self._shape.group_size,
            temperature=TEMPERATURE,
            max_response_tokens=self._shape.response_tokens,
            seed=0,
            purpose=f"gad/{self._step}",
        )
        as_read = reread(groups, [example.row for example in batch], self._renderer)
        objective = discriminator_objective(as_read, "bradley_terry")
        scores, _ = self._discriminator.forward_backward(as_read, objective)
        rewards = student_scores(scores, as_read)

        student_groups = [group.only_students() for group in groups]
        reference = self._reference.forward(student_groups)
        student_objective = grpo_objective(
            student_groups,
            group_advantages(rewards).flatten(),
            reference,
            clip_range=CLIP_RANGE,
            kl_coefficient=KL_COEFFICIENT,
        )
        logprobs, _ = self._student.forward_backward(student_groups, student_objective)
        for engine in (self._discriminator, self._student):
            engine.clip_gradients()
            engine.step(LEARNING_RATE)
        self._sampler.update(self._student.weights())

        discriminator_metrics(scores, as_read)
        policy_metrics(logprobs, reference, student_groups, samples)
        group_metrics(rewards, groups)
        rollout_metrics(groups)
