"""The headline metrics: name, unit, meaning, and what bad looks like. Everything else goes under
`detail/`.

Names are `part/name_unit`. The discriminator's scores have no absolute meaning: only differences
within one prompt count, so score levels are never a headline. How well they rank the samples of a prompt
is what matters most and cannot be measured without an oracle; `detail/rouge_rank_correlation` is a weak
proxy (see `stages/diagnostics.py`). What an alarm reads may well be a detail: the catalogue of alarms says
what it means.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One headline metric of `metrics.jsonl`."""

    name: str
    label: str
    meaning: str
    bad: str


HEADLINES: tuple[Metric, ...] = (
    Metric(
        "discriminator/accuracy",
        "told apart",
        "share of fresh pairs in which the teacher scores higher, before the update; ties count half",
        "near 1 early: a surface shortcut; below 0.5 for long: the discriminator is fooled",
    ),
    Metric(
        "discriminator/score_gap",
        "score gap",
        "mean teacher score minus mean student score of the same prompt, before the update",
        "growing without end: the discriminator explodes",
    ),
    Metric(
        "discriminator/loss",
        "discriminator loss",
        "the discriminator's loss in nats; chance is log 2 = 0.693 (cross-entropy: twice that)",
        "near 0: separated, no signal left; stuck at chance: it learns nothing",
    ),
    Metric(
        "discriminator/grad_norm",
        "discriminator gradient",
        "norm of the discriminator's gradient before clipping",
        "near 0 while accuracy is 1: saturated",
    ),
    Metric(
        "probe/accuracy",
        "probe accuracy",
        "accuracy on frozen pairs of held-out prompts, samples from the start of the stage",
        "far below the fresh accuracy: it memorises",
    ),
    Metric(
        "probe/margin",
        "probe margin",
        "mean score gap on the same frozen pairs",
        "falling while the fresh gap grows: it chases, and forgets",
    ),
    Metric(
        "student/loss",
        "student loss",
        "SFT: nats per teacher token; gad: policy loss plus KL term",
        "SFT: rising on held-out prompts; gad: its size alone says nothing",
    ),
    Metric(
        "student/kl_nats",
        "KL",
        "k3 estimate of the KL divergence to the post-warmup student, a token",
        "steep growth: the student drifts; raise gad.kl_coefficient",
    ),
    Metric(
        "student/entropy_nats",
        "entropy",
        "entropy of the student's next-token distribution on its samples, at the sampling temperature",
        "falling to 0: collapse to one answer",
    ),
    Metric(
        "student/grad_norm",
        "student gradient",
        "norm of the student's gradient before clipping",
        "exactly 0: nothing to learn from; spikes: unstable",
    ),
    Metric(
        "group/score_std",
        "in-group spread",
        "mean standard deviation of the scores within a group",
        "near 0: the discriminator sees no difference, so there is no advantage",
    ),
    Metric(
        "group/zero_variance_fraction",
        "flat groups",
        "share of groups whose scores are all equal: they teach nothing",
        "above 0.5: no learning signal; raise the temperature or group_size",
    ),
    Metric(
        "group/distinct_fraction",
        "distinct samples",
        "share of different texts among the samples of a group",
        "near 1/G: the samples are copies",
    ),
    Metric(
        "rollout/response_tokens",
        "sample length",
        "mean length of the samples in tokens, end of turn included",
        "running away or collapsing against the teacher's",
    ),
    Metric(
        "rollout/length_ratio",
        "length ratio",
        "mean sample length over mean teacher length, in tokens",
        "far from 1: length may be what the discriminator reads",
    ),
    Metric(
        "rollout/finished_fraction",
        "finished",
        "share of samples that ended by themselves within the cap",
        "below the teacher's share: raise sampling.max_response_tokens",
    ),
    Metric(
        "evaluation/rouge_l",
        "ROUGE-L",
        "overlap of greedy held-out answers with the teacher's: a diagnostic, not quality",
        "falling steadily",
    ),
    Metric(
        "evaluation/tell_accuracy",
        "told by a classifier",
        "how often an independent classifier tells greedy held-out answers from the teacher's; 0.5 is chance",
        "rising while the student's scores do: it learns to please the discriminator, not to write like the "
        "teacher",
    ),
    Metric(
        "evaluation/length_ratio",
        "held-out length ratio",
        "mean greedy answer length over the teacher's, in characters",
        "far from 1",
    ),
    Metric(
        "evaluation/finished_fraction",
        "held-out finished",
        "share of greedy held-out answers that ended by themselves",
        "falling",
    ),
    Metric(
        "evaluation/repetition",
        "repetition",
        "share of repeated word 4-grams in greedy held-out answers",
        "rising: loops",
    ),
)

# Fields that say when or how long; two runs of the same recipe differ in them alone.
TIME_PREFIX = "time/"


def without_time(row: dict[str, object]) -> dict[str, object]:
    """A metrics row without its time fields: what a resumed run must repeat exactly."""
    return {key: value for key, value in row.items() if not key.startswith(TIME_PREFIX)}
