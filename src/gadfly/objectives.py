"""What each kind of step minimises, as a function of a micro-batch that the engine can call.

An objective counts its normaliser over the whole batch first, so the losses of the micro-batches
add up.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gadfly import losses
from gadfly.discriminator import Scores
from gadfly.groups import Group
from gadfly.logprobs import Logprobs
from gadfly.packing import MicroBatch, num_response_tokens, num_rows

ScoreObjective = Callable[[Scores, MicroBatch], Tensor]
LogprobObjective = Callable[[Logprobs, MicroBatch], Tensor]


def discriminator_objective(
    groups: Sequence[Group], kind: Literal["bradley_terry", "cross_entropy"], *, centring: float = 0.0
) -> ScoreObjective:
    """The discriminator's loss over all P x G x K pairs of the batch.

    Args:
        groups: teacher and student branches; a pair counts as much as its teacher branch.
        kind: which loss.
        centring: weight of the mean square of the scores beside it.
    """
    num_pairs = sum(branch.weight * len(group.students) for group in groups for branch in group.teachers)
    weights, total_rows = _row_weights(groups), num_rows(groups)
    loss = losses.bradley_terry_loss if kind == "bradley_terry" else losses.cross_entropy_loss

    def objective(scores: Scores, batch: MicroBatch) -> Tensor:
        own = None if weights is None else weights.to(scores.values)[batch.rows]
        main_loss = loss(scores.values, batch.group_index, batch.is_teacher, num_pairs=num_pairs, weights=own)
        if centring == 0:
            return main_loss
        return main_loss + centring * losses.centring_loss(scores.values, num_rows=total_rows)

    return objective


def sft_objective(groups: Sequence[Group]) -> LogprobObjective:
    """Imitation of the teacher responses: each is back-propagated once, and counts by its weight."""
    weights = _row_weights(groups)
    num_tokens = sum(branch.weight * len(branch.tokens) for group in groups for branch in group.branches)

    def objective(now: Logprobs, batch: MicroBatch) -> Tensor:
        own = None if weights is None else weights.to(now.values)[batch.rows]
        return losses.sft_loss(now.values, batch.response_mask, num_tokens=num_tokens, weights=own)

    return objective


def _row_weights(groups: Sequence[Group]) -> Float[Tensor, " row"] | None:
    """What each row of the batch counts; None where all count 1."""
    weights = [branch.weight for group in groups for branch in group.branches]
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights, dtype=torch.float64)


def grpo_objective(
    groups: Sequence[Group],
    advantages: Float[Tensor, " row"],
    reference: Logprobs | None,
    *,
    clip_range: float,
    kl_coefficient: float,
) -> LogprobObjective:
    """GRPO with the KL term in the loss.

    There is one update a batch, so the student that sampled is the student now: the old
    log-probabilities are today's, held fixed, and the ratio is exactly 1.

    Args:
        groups: student branches only.
        advantages: one for each row of the batch.
        reference: log-probabilities under the frozen student; None where `kl_coefficient` is 0.
        clip_range: half-width of the ratio's range.
        kl_coefficient: weight of the KL term.
    """
    num_tokens = num_response_tokens(groups)

    def objective(now: Logprobs, batch: MicroBatch) -> Tensor:
        mask = batch.response_mask
        loss = losses.grpo_loss(
            now.values,
            now.values.detach(),
            advantages[batch.rows],
            mask,
            clip_range=clip_range,
            num_tokens=num_tokens,
        )
        if reference is None:
            return loss
        ref_logprobs = reference.values[batch.rows, : mask.shape[1]]
        return loss + kl_coefficient * losses.kl_penalty(
            now.values, ref_logprobs, mask, num_tokens=num_tokens
        )

    return objective
