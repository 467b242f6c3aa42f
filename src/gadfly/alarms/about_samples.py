"""Detectors of what the samples look like: how they end, how long they are, how much they differ.

Every bound is calibrated on runs that went well and on planted faults: docs/alarms.md has the figures.
"""

from gadfly.alarms.alarm import Finding
from gadfly.alarms.bands import change_band, mean_band
from gadfly.alarms.history import History, Series

# Nats a token to where the stage began.
_AWAY = 1.0

# What is a fifth above its start has grown, noise of these five steps allowed for.
_GROWN = 1.2


def ends_differ(history: History) -> Finding | None:
    """The samples end by themselves far more rarely, or more often, than the teacher's answers.

    The smaller the difference, the longer it has to last: runs that went well had excursions of up to 0.6
    that were over after 20 steps.
    """
    student, teacher = history["rollout/finished_fraction"], history["detail/teacher_finished_fraction"]
    if history.stage == "warmup":
        # An untrained student rambles: it counts once training has had time to mend that, and does not.
        trained = history["student/grad_norm"].steps
        if len(trained) < history.window:
            return None
        first = trained[0] + history.window
        student, teacher = (
            Series([step for step in series.steps if step >= first], series.between(first, history.step))
            for series in (student, teacher)
        )
    window = history.window
    for count, bound in ((window // 2, 0.7), (window, 0.5), (3 * window, 0.25)):
        ours, theirs = student.last(count), teacher.last(count)
        if len(ours) < count or len(theirs) < count:
            continue
        apart = [a - b for a, b in zip(theirs.values, ours.values, strict=True)]
        band = mean_band(apart)
        is_mending = change_band([abs(value) for value in apart]).is_below(-bound / 4)
        if (band.is_above(bound) or band.is_below(-bound)) and not is_mending:
            shares = mean_band(ours.values).value, mean_band(theirs.values).value
            return Finding(
                f"{shares[0]:.0%} of the samples and {shares[1]:.0%} of the teacher's answers ended by "
                f"themselves over {count} steps",
                ours.steps[0],
            )
    return None


def length_runaway(history: History) -> Finding | None:
    """The samples grow beyond the teacher's length, and beyond where they began."""
    series = history["rollout/length_ratio"]
    for count, bound in ((history.window // 2, 1.7), (history.window, 1.35)):
        last = series.last(count)
        if len(last) < count:
            continue
        band = mean_band(last.values)
        if band.is_above(max(bound, _GROWN * series.start())):
            return Finding(
                f"the samples are {band.value:.2f} times as long as the teacher's answers over {count} steps "
                f"(band from {band.low:.2f}), {series.start():.2f} times at the start of the stage",
                last.steps[0],
            )
    return None


def collapse(history: History) -> Finding | None:
    """Almost nothing is left of the length or of the entropy that the stage began with."""
    count = history.window // 2
    length, entropy = history["rollout/length_ratio"], history["student/entropy_nats"]
    short, sure = length.last(count), entropy.last(count)
    if len(short) == count:
        band = mean_band(short.values)
        if band.is_below(0.5) and band.is_below(0.5 * length.start()):
            return Finding(
                f"the samples are {band.value:.2f} times as long as the teacher's answers over {count} "
                f"steps, {length.start():.2f} times at the start of the stage",
                short.steps[0],
            )
    if len(sure) == count:
        band = mean_band(sure.values)
        if band.is_below(0.1) and band.is_below(0.4 * entropy.start()):
            return Finding(
                f"entropy {band.value:.3f} nats a token over {count} steps, {entropy.start():.3f} at the "
                f"start of the stage",
                sure.steps[0],
            )
    return None


def repetition(history: History) -> Finding | None:
    """Loops in greedy held-out answers that were not there before, nor are in the teacher's, and stay.

    Runs that went well had some that were a quarter fewer at the next evaluation and soon gone.
    """
    series = history.evaluated("evaluation/repetition")
    teachers = max(history["detail/teacher_repetition"].values, default=0.0)
    for count in (2, 3):
        before, last = series.values[:-count], series.last(count)
        if not before or min(last.values) <= max(min(before), teachers) + 0.15:
            return None
        if count == 3 or last.values[-1] >= 0.8 * last.values[0]:
            shares = ", ".join(f"{value:.0%}" for value in last.values)
            return Finding(
                f"{shares} of the word 4-grams of held-out answers are repeats at the last {count} "
                f"evaluations, {min(before):.0%} before, {teachers:.0%} of the teacher's",
                last.steps[0],
            )
    return None


def drift(history: History) -> Finding | None:
    """The student is far from where the stage began, by the bands of the last steps."""
    kl = history["student/kl_nats"]
    last = kl.last(history.window // 2)
    if len(last) == history.window // 2 and (band := mean_band(last.values)).is_above(_AWAY):
        return Finding(
            f"KL to the student after warmup {band.value:.2f} nats a token over {len(last)} steps "
            f"(band from {band.low:.2f})",
            _left_at(kl, last.steps[0]),
        )
    return None


def _left_at(kl: Series, first: int) -> int:
    """The step that took the student half the way to what was seen from step `first` on: of the KL of a step
    it is the update before that has made it so.
    """
    pairs = zip(kl.steps, kl.values, strict=True)
    return max((step for step, value in pairs if step <= first and value < _AWAY / 2), default=first)


def no_signal(history: History) -> Finding | None:
    """Most groups have scores that are all equal."""
    last = history["group/zero_variance_fraction"].last(history.window)
    if len(last) >= history.window // 4 and (band := mean_band(last.values)).is_above(0.5):
        return Finding(
            f"all scores are equal in {band.value:.0%} of the groups over {len(last)} steps", last.steps[0]
        )
    return None


def copies(history: History) -> Finding | None:
    """Hardly a sample of a group differs from the others."""
    size = history.circumstances.group_size
    last = history["group/distinct_fraction"].last(history.window)
    if size < 2 or len(last) < history.window // 4:
        return None
    # Share of the samples beyond the first that are new: 0 for copies, 1 where all differ.
    new = [(size * value - 1) / (size - 1) for value in last.values]
    if mean_band(new).is_below(0.25):
        shown = mean_band(last.values).value
        return Finding(
            f"{shown * size:.1f} of the {size} samples of a group are different texts over {len(last)} steps",
            last.steps[0],
        )
    return None
