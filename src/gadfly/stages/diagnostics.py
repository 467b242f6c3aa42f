"""A step's outputs as metrics (names and meanings: `metrics.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

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

# Of a step; ROUGE-L is quadratic in length, and a model waits for it.
_RANKED_GROUPS = 32
# Below this the scores of a group are equal but for rounding.
_FLAT = 1e-6


def student_scores(scores: Scores, groups: Sequence[Group]) -> Float[Tensor, "group sample"]:
    """The scores of the student's rows, one line a group."""
    flags = [place >= len(group.teachers) for group in groups for place in range(len(group.branches))]
    mask = torch.tensor(flags, device=scores.values.device)
    return scores.values[mask].reshape(len(groups), -1)


@dataclass(frozen=True)
class GroupScores:
    """The scores of one group: a teacher's for each of its teacher branches, then the samples'."""

    teachers: Float[Tensor, " teacher"]
    students: Float[Tensor, " sample"]

    @property
    def gaps(self) -> Float[Tensor, "teacher sample"]:
        """Teacher less sample, for every pair."""
        return self.teachers[:, None] - self.students[None, :]


def scores_by_group(scores: Scores, groups: Sequence[Group]) -> list[GroupScores]:
    """The rows of a batch as groups, in double precision on the CPU."""
    counts = [count for group in groups for count in (len(group.teachers), len(group.students))]
    parts = scores.values.double().cpu().split(counts)
    return [GroupScores(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def accuracy_and_gap(grouped: Sequence[GroupScores]) -> tuple[float, float]:
    """Over all pairs: the share in which the teacher scores higher (ties half), and the mean gap."""
    gaps = torch.cat([group.gaps.flatten() for group in grouped])
    return float(_wins(gaps).mean()), float(gaps.mean())


def discriminator_metrics(scores: Scores, groups: Sequence[Group]) -> Metrics:
    """What the discriminator makes of a step's fresh groups, and whether length or rounding decides it.

    Args:
        scores: before the update.
        groups: as the discriminator reads them.
    """
    grouped = scores_by_group(scores, groups)
    accuracy, gap = accuracy_and_gap(grouped)
    metrics = {
        "discriminator/accuracy": accuracy,
        "discriminator/score_gap": gap,
        "detail/score_rms": float(scores.values.double().square().mean().sqrt()),
    }
    details = {
        "detail/tied_fraction": _tied_fraction(grouped, groups),
        "detail/length_matched_accuracy": _length_matched_accuracy(grouped, groups),
        "detail/length_score_correlation": _length_score_correlation(grouped, groups),
    }
    return metrics | {name: value for name, value in details.items() if value is not None}


def _wins(gaps: Tensor) -> Tensor:
    return (gaps > 0).double() + 0.5 * (gaps == 0).double()


def _tied_fraction(grouped: Sequence[GroupScores], groups: Sequence[Group]) -> float | None:
    """Of the pairs of branches of a group with different texts, the share with one score to the last bit.

    More than a few are the work of rounding: the scores are computed too coarsely.
    """
    num_pairs = num_tied = 0
    for own, group in zip(grouped, groups, strict=True):
        scores = [*own.teachers.tolist(), *own.students.tolist()]
        branches = zip(scores, (branch.text for branch in group.branches), strict=True)
        for (score, text), (other_score, other_text) in combinations(branches, 2):
            num_pairs += text != other_text
            num_tied += text != other_text and score == other_score
    return num_tied / num_pairs if num_pairs else None


def _length_matched_accuracy(grouped: Sequence[GroupScores], groups: Sequence[Group]) -> float | None:
    """Accuracy over the pairs whose lengths in tokens differ by at most a tenth of the longer."""
    is_matched = [
        10 * abs(len(teacher.tokens) - len(student.tokens)) <= max(len(teacher.tokens), len(student.tokens))
        for group in groups
        for teacher in group.teachers
        for student in group.students
    ]
    matched = torch.cat([group.gaps.flatten() for group in grouped])[torch.tensor(is_matched)]
    return float(_wins(matched).mean()) if len(matched) else None


def _length_score_correlation(grouped: Sequence[GroupScores], groups: Sequence[Group]) -> float | None:
    """Pearson's correlation of length in tokens and score among the samples of a prompt, averaged.

    A prompt whose samples are equally long, or score equally, is left out.
    """
    scores = torch.stack([group.students for group in grouped])
    lengths = torch.tensor([[float(len(b.tokens)) for b in g.students] for g in groups], dtype=torch.float64)
    centred = [values - values.mean(1, keepdim=True) for values in _with_order(scores, lengths)]
    return _mean_cosine(*centred)


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

    The mean over the first groups of Spearman's rank correlation, ties by mid-ranks. A group whose scores, or
    whose ROUGE-L, are all equal has no order and is left out; where that leaves none there is no metric.

    ROUGE-L is a proxy of quality, and a poor one where an answer may be worded or ordered in many ways: on
    the demo, discriminators that put nearly every valid sample before the invalid ones correlate with it near
    0. A fall from well above 0 means something; the level itself does not.
    """
    ranked = groups[:_RANKED_GROUPS]
    overlap = [[rouge_l(b.text, [t.text for t in g.teachers]) for b in g.students] for g in ranked]
    own_scores = scores[: len(ranked)].double().cpu()
    pair = _with_order(own_scores, torch.tensor(overlap, dtype=torch.float64))
    correlation = _mean_cosine(*(_mid_ranks(values) for values in pair))
    return {} if correlation is None else {"detail/rouge_rank_correlation": correlation}


def _with_order(
    first: Float[Tensor, "group sample"], second: Float[Tensor, "group sample"]
) -> tuple[Float[Tensor, "ordered sample"], Float[Tensor, "ordered sample"]]:
    """Of two values of every sample, the groups in which neither is all equal but for rounding."""
    if first.shape[1] < 2:
        return first[:0], second[:0]
    has_order = (first.std(1) > _FLAT) & (second.std(1) > _FLAT)
    return first[has_order], second[has_order]


def _mean_cosine(first: Float[Tensor, "group sample"], second: Float[Tensor, "group sample"]) -> float | None:
    return float(torch.cosine_similarity(first, second, dim=1).mean()) if len(first) else None


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
