"""Detectors of what the discriminator does: whether its scores can teach, and what they may be read off."""

import math

from gadfly.alarms.alarm import Finding
from gadfly.alarms.bands import change_band, mean_band
from gadfly.alarms.history import History

_ACCURACY = "discriminator/accuracy"
# Steps of the new discriminator in which it should not have learnt to tell everything.
_EARLY = 12


def score_ties(history: History) -> Finding | None:
    """Different texts of a group have exactly the same score, again and again.

    In single precision that does not happen; after rounding to bfloat16 it does to one pair in some hundred.
    """
    last = history["detail/tied_fraction"].last(history.window)
    band = mean_band(last.values)
    num_tied = sum(value > 0 for value in last.values)
    if num_tied >= history.window // 4 and band.value > 0.002:
        return Finding(
            f"{band.value:.1%} of the pairs of different answers to a prompt have exactly the same score, at "
            f"{num_tied} of {len(last)} steps",
            last.steps[0],
        )
    return None


def score_explosion(history: History) -> Finding | None:
    """The size of the raw scores is beyond all use, or many times what it was and still growing."""
    series = history["detail/score_rms"]
    last = series.last(history.window // 2)
    if len(last) < history.window // 2:
        return None
    band = mean_band(last.values)
    grows = change_band(last.values).is_above(0.0) and band.is_above(4 * series.start())
    if band.is_above(100.0) or (band.is_above(25.0) and grows):
        return Finding(
            f"raw scores of size {band.value:.1f} (root mean square) over {len(last)} steps, "
            f"{series.start():.1f} at the start of the stage",
            last.steps[0],
        )
    return None


def saturated(history: History) -> Finding | None:
    """All is told apart, and the gradient is next to nothing beside what it was, or at all."""
    count = history.window // 2
    accuracy, norm = history[_ACCURACY].last(count), history["discriminator/grad_norm"]
    small = norm.last(count)
    if len(accuracy) < count or len(small) < count:
        return None
    band = mean_band(small.values)
    is_nothing = band.is_below(0.01 * max(norm.values)) or band.is_below(1e-3)
    if min(accuracy.values) > 0.98 and is_nothing:
        return Finding(
            f"accuracy {mean_band(accuracy.values).value:.3f} and a gradient norm of {band.value:.2g} over "
            f"{count} steps, {max(norm.values):.2g} at most before",
            accuracy.steps[0],
        )
    return None


def separates_early(history: History) -> Finding | None:
    """A new discriminator tells nearly every pair four steps running, within its first few."""
    series = history[_ACCURACY]
    last = series.last(4)
    if 4 <= len(series) <= _EARLY and min(last.values) > 0.95:
        shown = ", ".join(f"{value:.2f}" for value in series.values)
        return Finding(f"accuracy on fresh pairs at its first steps: {shown}", series.steps[0])
    return None


def too_strong(history: History) -> Finding | None:
    """Nearly every pair is told, and the teacher is out of reach of the differences between samples.

    Accuracy alone is not enough: runs that went well stayed above 0.97 for a hundred steps, with a gap of
    three to eight times the spread within a group.
    """
    accuracy = history[_ACCURACY].last(history.window)
    gap, spread = history["discriminator/score_gap"].last(history.window), history["group/score_std"]
    if len(accuracy) < history.window or not (band := mean_band(accuracy.values)).is_above(0.95):
        return None
    apart, within = mean_band(gap.values).value, mean_band(spread.last(history.window).values).value
    if len(spread) and apart > 12 * within:
        return Finding(
            f"accuracy on fresh pairs {band.value:.3f} over {len(accuracy)} steps; the gap to the teacher, "
            f"{apart:.2f}, is {apart / max(within, 1e-9):.0f} times the spread within a group",
            accuracy.steps[0],
        )
    return None


def fooled(history: History) -> Finding | None:
    """It takes the student for the teacher more often than not."""
    last = history[_ACCURACY].last(history.window)
    if len(last) == history.window and (band := mean_band(last.values)).is_below(0.5):
        return Finding(
            f"accuracy on fresh pairs {band.value:.3f} over {len(last)} steps (band up to {band.high:.3f})",
            last.steps[0],
        )
    return None


def memorises(history: History) -> Finding | None:
    """It does much worse on held-out prompts than on those it is trained on, at three evaluations running."""
    fresh = history[_ACCURACY]
    for metric, where in (
        ("detail/held_out_accuracy", "on fresh samples of held-out prompts"),
        ("probe/accuracy", "on the frozen probe"),
    ):
        last = history.evaluated(metric).last(3)
        trained = fresh.between(last.steps[0], last.steps[-1]) if len(last) == 3 else []
        if len(trained) < history.window // 4:
            continue
        band = mean_band(trained)
        worse = max(last.values)
        # The same few prompts every time: three evaluations are hardly surer than one.
        noise = 3 * math.sqrt(worse * (1 - worse) / history.circumstances.held_out)
        if band.is_above(worse + noise + 0.05) and band.value > 0.6:
            return Finding(
                f"accuracy {band.value:.3f} on prompts it is trained on, {worse:.3f} {where} at the best "
                f"of three evaluations",
                last.steps[0],
            )
    return None


def surface_shortcut(history: History) -> Finding | None:
    """Surface features tell held-out pairs as well as the discriminator does, at two evaluations running."""
    surface = history.evaluated("detail/surface_accuracy").last(2)
    own = history.evaluated("detail/held_out_accuracy").last(2)
    if len(surface) < 2 or surface.steps != own.steps:
        return None
    pairs = list(zip(surface.values, own.values, strict=True))
    if all(min(pair) >= 0.85 and pair[0] >= pair[1] - 0.05 for pair in pairs):
        plain, learnt = pairs[-1]
        return Finding(
            f"on the same held-out pairs a classifier of surface features has accuracy {plain:.3f}, the "
            f"discriminator {learnt:.3f}",
            surface.steps[0],
        )
    return None


def format_sensitive(history: History) -> Finding | None:
    """A change of layout moves the score by much of the gap to the teacher, at two evaluations running."""
    last = history.evaluated("detail/perturbation_share").last(2)
    own = history.evaluated("detail/held_out_accuracy").last(2)
    # Without a gap to speak of, any change is a large share of it.
    if len(last) == 2 and min(last.values) > 0.5 and (not len(own) or min(own.values) > 0.7):
        return Finding(
            f"white space, a punctuation mark or the layout of lines moves a score by "
            f"{last.values[-1]:.0%} of the gap between teacher and student",
            last.steps[0],
        )
    return None


def length_bias(history: History) -> Finding | None:
    """The score of a sample goes by its length, and pairs of the same length are told worse."""
    count = history.window
    alike, matched = history["detail/length_score_correlation"], history["detail/length_matched_accuracy"]
    last, close = alike.last(count), matched.last(count)
    if len(last) < count:
        return None
    band = mean_band(last.values)
    worse = mean_band(history[_ACCURACY].last(count).values).value - mean_band(close.values).value
    bound, lost = (0.5, worse) if len(close) >= count // 2 else (0.7, 1.0)
    if (band.is_above(bound) or band.is_below(-bound)) and lost > 0.1:
        clause = f", accuracy {worse:.2f} lower on pairs of about the same length" if len(close) else ""
        return Finding(
            f"correlation of length and score within a group {band.value:+.2f} over {count} steps{clause}",
            last.steps[0],
        )
    return None
