"""The maths of the method as pure functions. Log-probabilities are natural (nats), losses are
scalars.

A batch is worked in micro-batches, so each loss takes its normaliser (`num_tokens`, `num_pairs`),
counted over the whole batch, and returns the micro-batch's share of the batch's loss: the shares
add up.

Axes: `row` responses (branches), `token` response positions, `group` prompts, `sample` responses of
    one prompt.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to the group's standard deviation (verl's `norm_adv_by_std_in_grpo`)."""


def group_advantages(rewards: Float[Tensor, "group sample"]) -> Float[Tensor, "group sample"]:
    """Rewards of a group on a common footing: zero mean, sample standard deviation near one.

    A group of equal rewards has zero advantages, exactly. Offset and scale of the rewards cancel.

    Raises:
        ValueError: if a group has fewer than two samples.

    Source: arXiv 2511.10643, eq. 6; epsilon from the reference's trainer.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} sample has no advantage; at least 2 are needed")
    # In double precision the sum of equal single-precision rewards is exact. Otherwise the rounding of the
    # mean, of rewards far from zero, would count beside a deviation of zero and STD_EPSILON.
    exact = rewards.double()
    centred = exact - exact.mean(1, keepdim=True)
    return (centred / (exact.std(1, correction=1, keepdim=True) + STD_EPSILON)).to(rewards.dtype)


def bounded_reward(scores: Float[Tensor, "group sample"]) -> Float[Tensor, "group sample"]:
    """`log sigmoid(s)`: the score where it is far below zero, and never more than 0.

    In double precision: above a score of 17, single precision could not tell one from another.
    """
    return F.logsigmoid(scores.double())


def variance_shares(parts: Sequence[Float[Tensor, "group sample"]]) -> list[float]:
    """How much of the variance of a sum of advantages each of its parts brings in.

    A part's covariance with the sum over the sum's variance. They add up to 1; one that works against the
    rest has a share below 0. Empty where the sum has no variance.

    Args:
        parts: advantages, of mean zero within each group.
    """
    exact = [part.double() for part in parts]
    whole = torch.stack(exact).sum(0)
    variance = float(whole.square().sum())
    return [float((part * whole).sum()) / variance for part in exact] if variance > 0 else []


def bradley_terry_loss(
    scores: Float[Tensor, " row"],
    group_index: Int[Tensor, " row"],
    is_teacher: Bool[Tensor, " row"],
    *,
    num_pairs: float | int,
    weights: Float[Tensor, " row"] | None = None,
) -> Float[Tensor, ""]:
    """`-log sigmoid(s_teacher - s_student)` over every teacher-student pair of a group: log 2 at
    equal scores.

    Args:
        scores: the discriminator's scores.
        group_index: rows pair only within the same group.
        is_teacher: the row's role.
        num_pairs: teacher-student pairs of the whole batch (P x G x K), each as many times as its weight.
        weights: what a pair counts, by the row of its teacher response; 1 each without them.

    Source: arXiv 2511.10643, eq. 3 and 8.
    """
    teacher, student = _pairs(group_index, is_teacher)
    return _weighted_sum(-F.logsigmoid(scores[teacher] - scores[student]), weights, teacher) / num_pairs


def cross_entropy_loss(
    scores: Float[Tensor, " row"],
    group_index: Int[Tensor, " row"],
    is_teacher: Bool[Tensor, " row"],
    *,
    num_pairs: float | int,
    weights: Float[Tensor, " row"] | None = None,
) -> Float[Tensor, ""]:
    """`-log sigmoid(s_teacher) - log(1 - sigmoid(s_student))` over the same pairs: 2 log 2 at
    scores of zero.

    Source: arXiv 2511.10643, eq. 4 (ablation only).
    """
    teacher, student = _pairs(group_index, is_teacher)
    costs = -(F.logsigmoid(scores[teacher]) + F.logsigmoid(-scores[student]))
    return _weighted_sum(costs, weights, teacher) / num_pairs


def centring_loss(scores: Float[Tensor, " row"], *, num_rows: int) -> Float[Tensor, ""]:
    """Mean square of the raw scores: what ties them to zero.

    Pair losses see differences alone. So nothing else holds the level of the scores, nor their size once
    teacher and student are told apart.

    Args:
        scores: the discriminator's, which are the reward.
        num_rows: rows of the whole batch.
    """
    return scores.square().sum() / num_rows


def _weighted_sum(
    costs: Float[Tensor, " pair"], weights: Float[Tensor, " row"] | None, teacher: Int[Tensor, " pair"]
) -> Float[Tensor, ""]:
    return costs.sum() if weights is None else (weights[teacher] * costs).sum()


def _pairs(
    group_index: Int[Tensor, " row"], is_teacher: Bool[Tensor, " row"]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Row indices of all teacher-student pairs that share a group."""
    same_group = group_index[:, None] == group_index[None, :]
    teacher, student = torch.nonzero(same_group & is_teacher[:, None] & ~is_teacher[None, :], as_tuple=True)
    return teacher, student


def sft_loss(
    logprobs: Float[Tensor, "row token"],
    response_mask: Bool[Tensor, "row token"],
    *,
    num_tokens: float | int,
    weights: Float[Tensor, " row"] | None = None,
) -> Float[Tensor, ""]:
    """Mean negative log-probability of the teacher's tokens over all response tokens of the batch.

    Args:
        logprobs: log-probability of each token.
        response_mask: true on the teacher's tokens, the end-of-turn token included.
        num_tokens: response tokens of the whole batch, each as many times as its weight.
        weights: what the tokens of a row count; 1 each without them.

    Source: arXiv 2511.10643, Algorithm 1, warmup; token mean as in the reference's SFT loss.
    """
    costs = -_on_tokens(logprobs, response_mask)
    return (costs if weights is None else weights[:, None] * costs).sum() / num_tokens


def grpo_loss(
    logprobs: Float[Tensor, "row token"],
    old_logprobs: Float[Tensor, "row token"],
    advantages: Float[Tensor, " row"],
    response_mask: Bool[Tensor, "row token"],
    *,
    clip_range: float,
    num_tokens: int,
) -> Float[Tensor, ""]:
    """Clipped policy-gradient loss: mean over all response tokens of the whole batch.

    Args:
        logprobs: log-probability of each token under the student now, at the sampling temperature.
        old_logprobs: the same when it was sampled; equal to `logprobs` at one update a batch.
        advantages: one a response, zero mean within its group.
        response_mask: true on generated tokens, the end-of-turn token included.
        clip_range: half-width of the allowed probability ratio around 1 (no unit).
        num_tokens: response tokens of the whole batch.

    Source: arXiv 2402.03300, eq. 3, without the KL term (see `kl_penalty`); token mean as in the
    reference.
    """
    ratio = torch.exp(_on_tokens(logprobs - old_logprobs, response_mask))
    gain = ratio * advantages[:, None]
    clipped_gain = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages[:, None]
    return -_on_tokens(torch.minimum(gain, clipped_gain), response_mask).sum() / num_tokens


def kl_penalty(
    logprobs: Float[Tensor, "row token"],
    ref_logprobs: Float[Tensor, "row token"],
    response_mask: Bool[Tensor, "row token"],
    *,
    num_tokens: int,
) -> Float[Tensor, ""]:
    """KL divergence to the reference, estimator k3 as a token mean: `exp(d) - 1 - d`, `d = ref - now`.

    Never negative, and zero only where the two agree.

    Source: Schulman, "Approximating KL divergence" (k3); the reference's `low_var_kl`.
    """
    difference = _on_tokens(ref_logprobs - logprobs, response_mask)
    # `expm1`: near zero, `exp(d) - 1` would lose in single precision what is left of it after `- d`.
    return (torch.expm1(difference) - difference).sum() / num_tokens


def _on_tokens(
    values: Float[Tensor, "row token"], mask: Bool[Tensor, "row token"]
) -> Float[Tensor, "row token"]:
    """Zero on padding, whatever stands there: it has no part in the value nor in the gradient."""
    return torch.where(mask, values, 0.0)
