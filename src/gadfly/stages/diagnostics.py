"""A step's outputs as metrics (names and meanings: `metrics.py`)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gadfly.chat_template import has_invalid_utf8
from gadfly.discriminator import Scores
from gadfly.groups import Group
from gadfly.logprobs import Logprobs, masked_mean
from gadfly.losses import kl_penalty
from gadfly.packing import num_response_tokens, num_rows
from gadfly.samplers import Sample
from gadfly.text_metrics import distinct_fraction, rouge_l

Metrics = dict[str, float]

# Below this the scores of a group are equal but for rounding.
_FLAT = 1e-6


def student_scores(scores: Scores, groups: Sequence[Group]) -> Float[Tensor, "group sample"]:
    """The scores of the student's rows, one line a group."""
    flags = [place >= len(group.teachers) for group in groups for place in range(len(group.branches))]
    mask = torch.tensor(flags, device=scores.values.device)
    return scores.values[mask].reshape(len(groups), -1)


def discriminator_metrics(scores: Scores, groups: Sequence[Group], prefix: str = "discriminator") -> Metrics:
    """Accuracy (ties half) and gap over all pairs, and the spread within groups."""
    values = scores.values.double()
    wins, gaps, row = [], [], 0
    for group in groups:
        teachers = values[row : row + len(group.teachers)]
        students = values[row + len(group.teachers) : row + len(group.branches)]
        row += len(group.branches)
        gap = (teachers[:, None] - students[None, :]).flatten()
        wins.append((gap > 0).double() + 0.5 * (gap == 0).double())
        gaps.append(gap)
    gap_name = "margin" if prefix == "probe" else "score_gap"
    return {
        f"{prefix}/accuracy": float(torch.cat(wins).mean()),
        f"{prefix}/{gap_name}": float(torch.cat(gaps).mean()),
    }


def group_metrics(scores: Float[Tensor, "group sample"], groups: Sequence[Group]) -> Metrics:
    """How much the samples of a group differ: without difference there is no advantage."""
    metrics = {
        "group/distinct_fraction": _mean([distinct_fraction([b.text for b in g.students]) for g in groups])
    }
    if scores.shape[1] > 1:
        deviation = scores.double().std(1)
        metrics["group/score_std"] = float(deviation.mean())
        metrics["group/zero_variance_fraction"] = float((deviation <= _FLAT).double().mean())
    return metrics


def ranking_metrics(scores: Float[Tensor, "group sample"], groups: Sequence[Group]) -> Metrics:
    """Whether the scores order the samples of a group as their ROUGE-L to the teacher does, in [-1, 1].

    The mean over groups of Spearman's rank correlation, ties by mid-ranks. A group whose scores, or whose
    ROUGE-L, are all equal has no order and is left out; where that leaves none there is no metric.

    ROUGE-L is a proxy of quality, and a poor one where an answer may be worded or ordered in many ways: on
    the demo, discriminators that put nearly every valid sample before the invalid ones correlate with it near
    0. A fall from well above 0 means something; the level itself does not.
    """
    if scores.shape[1] < 2:
        return {}
    overlap = [[rouge_l(b.text, [t.text for t in g.teachers]) for b in g.students] for g in groups]
    pair = scores.double().cpu(), torch.tensor(overlap, dtype=torch.float64)
    has_order = (pair[0].std(1) > _FLAT) & (pair[1].std(1) > _FLAT)
    if not bool(has_order.any()):
        return {}
    first, second = (_mid_ranks(values[has_order]) for values in pair)
    return {"detail/rouge_rank_correlation": float(torch.cosine_similarity(first, second, dim=1).mean())}


def _mid_ranks(values: Float[Tensor, "group sample"]) -> Float[Tensor, "group sample"]:
    """The rank of each value in its group, as a distance from the mean rank; equal values share one."""
    own, other = values[:, :, None], values[:, None, :]
    return ((own > other).double() - (own < other).double()).sum(2) / 2


def rollout_metrics(groups: Sequence[Group]) -> Metrics:
    """Length and end of the samples against the teacher's."""
    students = [group.only_students() for group in groups]
    teachers = [group.only_teachers() for group in groups]
    length = num_response_tokens(students) / num_rows(students)
    teacher_length = num_response_tokens(teachers) / num_rows(teachers)
    branches = [branch for group in groups for branch in group.students]
    return {
        "rollout/response_tokens": length,
        "rollout/length_ratio": length / max(teacher_length, 1e-9),
        "rollout/finished_fraction": _mean([float(branch.finished) for branch in branches]),
        "detail/invalid_utf8_fraction": _mean([float(has_invalid_utf8(branch.text)) for branch in branches]),
        "detail/teacher_finished_fraction": _mean([float(b.finished) for g in groups for b in g.teachers]),
    }


def policy_metrics(
    now: Logprobs,
    reference: Logprobs | None,
    groups: Sequence[Group],
    samples: Sequence[Sequence[Sample]],
) -> Metrics:
    """Entropy, KL to the reference, and how far the sampler's log-probabilities are from the trainer's."""
    drawn = [sample for group in samples for sample in group]
    sampled = torch.zeros_like(now.values)
    mask = torch.zeros_like(now.values, dtype=torch.bool)
    for row, sample in enumerate(drawn):
        sampled[row, : len(sample.tokens)] = torch.tensor(sample.logprobs, dtype=sampled.dtype)
        mask[row, : len(sample.tokens)] = True
    metrics = {
        "student/entropy_nats": masked_mean(now.entropy, mask),
        "detail/sampler_gap_nats": masked_mean((now.values - sampled).abs(), mask),
    }
    if reference is not None:
        num_tokens = num_response_tokens(groups)
        metrics["student/kl_nats"] = float(
            kl_penalty(now.values, reference.values, mask, num_tokens=num_tokens)
        )
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
