"""Detectors of where training goes: in circles, after the wrong reward, or nowhere."""

import itertools
import math
from collections.abc import Iterator
from statistics import mean

from gadfly.alarms.alarm import Finding
from gadfly.alarms.bands import Band, mean_band
from gadfly.alarms.history import History, Series

_GAPS = "detail/snapshot_gap/"
_SHARES = "detail/reward_share/"
# The reward that is the method's own.
_OWN_REWARD = "discriminator"

# Steps that the spread of scores is a mean of.
_SPREAD_STEPS = 5

# What has moved if anything has: by how much at least, or by which share of where it began.
_HEADLINES = {
    "discriminator/accuracy": (0.03, 0.0),
    "discriminator/score_gap": (0.0, 0.1),
    "discriminator/loss": (0.0, 0.05),
    "group/score_std": (0.0, 0.1),
    "student/kl_nats": (1e-3, 0.0),
    "student/entropy_nats": (0.0, 0.03),
    "rollout/length_ratio": (0.03, 0.0),
}
# Of supervised stages alone: elsewhere the student's loss says nothing by its size.
_SUPERVISED = {"student/loss": (0.0, 0.01)}


def cycling(history: History) -> Finding | None:
    """By a frozen discriminator the student has given back half of what it had gained, twice running each.

    Only gaps that frozen discriminators measure can be compared from step to step. What they praised may have
    been a way around them that newer ones have closed: where by what no discriminator measures the answers
    are nearer to the teacher than then, and than at the start, it is progress.
    """
    for name, series in _snapshots(history):
        start, last = series.values[0], series.last(2)
        # Of single evaluations the lowest is low by chance: what two running reached.
        best, place = min((max(pair), at) for at, pair in enumerate(itertools.pairwise(series.values[:-2])))
        gained = start - best
        lost = min(last.values) - best
        noise = _noise(history, series)
        is_lost = gained > _a_gain(history, series) and lost > max(0.5 * gained, noise)
        if is_lost and not _is_nearer(history, *series.steps[place : place + 2]):
            return Finding(
                f"the gap to the teacher by the frozen discriminator {name}: {start:.2f} at first, "
                f"{best:.2f} at best, {last.values[0]:.2f} and {last.values[1]:.2f} at the last two "
                f"evaluations",
                last.steps[0],
            )
    return None


def _is_nearer(history: History, first: int, second: int) -> bool:
    """Whether the answers are nearer to the teacher than at two evaluations: a text classifier tells them
    less well, and ROUGE-L is higher, also than at the start of the stage, which a circle comes back to. All
    as means of two evaluations.
    """
    accuracy, overlap = history.evaluated("evaluation/tell_accuracy"), history.evaluated("evaluation/rouge_l")
    accuracy_then, overlap_then = (series.between(first, second) for series in (accuracy, overlap))
    if not accuracy_then or not overlap_then:
        return False
    share = mean(accuracy_then)
    # One standard error of a share of so many pairs: half of the prompts teach the classifier.
    noise = max(0.02, math.sqrt(share * (1 - share) / max(1, history.circumstances.held_out // 2)))
    before = max(mean(overlap_then), mean(overlap.values[:2]))
    return mean(accuracy.last(2).values) < share - noise and mean(overlap.last(2).values) > before


def hacking(history: History) -> Finding | None:
    """The score says better and an independent judge says worse, at the last two evaluations."""
    for name, series in _snapshots(history):
        start, last = series.values[0], series.last(2)
        if max(last.values) >= start - _a_gain(history, series):
            continue
        accuracy, overlap = (
            history.evaluated("evaluation/tell_accuracy"),
            history.evaluated("evaluation/rouge_l"),
        )
        gained = f"the gap to the teacher by the frozen discriminator {name} went from {start:.2f} to "
        gained += f"{last.values[-1]:.2f}"
        # Of single evaluations the lowest is low by chance; of neighbours both would have to be.
        pairs = [sum(pair) / 2 for pair in itertools.pairwise(accuracy.values)]
        if len(pairs) >= 3 and min(accuracy.last(2).values) > min(pairs[:-2]) + 0.18:
            worse = f"a text classifier tells the answers better: {min(pairs[:-2]):.2f}, now {pairs[-1]:.2f}"
            return Finding(f"{gained}, while {worse}", accuracy.last(2).steps[0])
        if len(overlap) >= 4:
            best, now = max(overlap.values[:-2]), max(overlap.last(2).values)
            if now < best - 0.05 and now < 0.8 * best:
                return Finding(
                    f"{gained}, while ROUGE-L to the teacher fell from {best:.2f} to {now:.2f}",
                    overlap.last(2).steps[0],
                )
    return None


def _a_gain(history: History, gaps: Series) -> float:
    """How much a gap has to fall to be called a gain, beside where it began and the spread of the scores."""
    return max(0.25 * max(abs(gaps.values[0]), _spread(history, gaps)), _noise(history, gaps))


def _noise(history: History, gaps: Series) -> float:
    """Three standard errors of the change of a mean gap, by fresh samples beside the same teacher answers."""
    return 3 * math.sqrt(2 / history.circumstances.held_out) * _spread(history, gaps)


def _spread(history: History, gaps: Series) -> float:
    """Of scores within a group when a frozen discriminator began to look on: scores grow with training."""
    spread = history["group/score_std"]
    if not len(spread):
        return math.inf
    before = [value for step, value in zip(spread.steps, spread.values, strict=True) if step <= gaps.steps[0]]
    return max(mean(before[-_SPREAD_STEPS:]), spread.start()) if before else spread.start()


def _snapshots(history: History) -> Iterator[tuple[str, Series]]:
    """The gaps by frozen discriminators that looked at the newest evaluation, and at three or more before."""
    newest = history.evaluated("detail/held_out_accuracy").last(1).steps
    for metric in history.names:
        series = history.evaluated(metric) if metric.startswith(_GAPS) else Series()
        if len(series) >= 4 and series.steps[-1:] == newest:
            yield metric.removeprefix(_GAPS), series


def reward_rules(history: History) -> Finding | None:
    """An extra reward has more of the advantages' variance than all the others."""
    for metric in history.names:
        last = history[metric].last(history.window)
        name = metric.removeprefix(_SHARES)
        if metric == name or name == _OWN_REWARD or len(last) < history.window // 2:
            continue
        if (band := mean_band(last.values)).is_above(0.5):
            return Finding(
                f"the reward {name} makes {band.value:.0%} of the variance of the advantages over "
                f"{len(last)} steps",
                last.steps[0],
            )
    return None


def no_learning(history: History) -> Finding | None:
    """No window of any headline metric differs, beyond noise and by more than a trifle, from the first one.

    Looked at once a window, from the fifth on.
    """
    window = history.window
    looked = _HEADLINES if len(history["discriminator/accuracy"]) else _SUPERVISED
    seen: list[str] = []
    since = 0
    for metric, (least, share) in looked.items():
        series = history[metric]
        if len(series) < 5 * window or len(series) % window:
            continue
        first, *later = (
            mean_band(series.values[start : start + window]) for start in range(0, len(series), window)
        )
        least = max(least, share * abs(first.value))
        if any(_has_moved(metric, first, band, least) for band in later):
            return None
        seen.append(f"{metric} {first.value:.3g}, now {later[-1].value:.3g}")
        since = series.last(window).steps[0]
    if not seen:
        return None
    return Finding(f"after {history.step} steps all is where it was, within noise: {'; '.join(seen)}", since)


def _has_moved(metric: str, first: Band, later: Band, least: float) -> bool:
    # A student that did not move has a KL of exactly 0 from itself: there is no noise to allow for.
    if metric == "student/kl_nats":
        return later.value > least
    noise = (first.high - first.low + later.high - later.low) / 4
    return abs(later.value - first.value) > max(noise, least)
