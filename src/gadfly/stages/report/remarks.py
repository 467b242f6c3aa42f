"""Remarks in words: what was seen, the numbers, the likely cause, and what to change.

Every threshold is a starting point from cases others have met, not a measured optimum. There is no
overall health score: a run can look fine in every figure and still be none the better for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

from gadfly.run_folder import Record, differences, model_identity
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.wording import counted, number, stage_label

_FINISHED_BELOW_TEACHER = 0.1
_PROBE_BELOW_FRESH = 0.1
# In the last quarter, and in multiples of the second: steady growth from 0 makes 2.3.
_KL_NATS, _KL_GROWTH = 0.1, 3.0
_REPETITION_RISE = 0.05
_FEW_STEPS = 100


@dataclass(frozen=True)
class Remark:
    """One thing worth a look."""

    what: str
    evidence: str
    cause: str
    change: str


@dataclass(frozen=True)
class Bound:
    """A remark due where a metric's mean over the last quarter of GAD is not in [low, high)."""

    metric: str
    what: str
    evidence: str
    """With `{}` for the mean."""
    cause: str
    change: str
    low: float = -inf
    high: float = inf


BOUNDS = (
    Bound(
        "discriminator/accuracy",
        "The discriminator tells nearly every sample",
        "Accuracy on fresh pairs {}; 0.95 or more leaves the student little to climb.",
        "It reads a surface trait (length, layout, how answers end), or it learns much faster than "
        "the student.",
        "Compare samples and teacher below for such a trait; then lower "
        "gad.discriminator_learning_rate, or give the student a longer warmup.",
        high=0.95,
    ),
    Bound(
        "discriminator/accuracy",
        "The discriminator is fooled",
        "Accuracy on fresh pairs {}; below 0.5 it prefers the student's answers.",
        "The student found what it rewards by mistake, and it is too weak or too slow to follow.",
        "Raise gad.discriminator_learning_rate or gad.kl_coefficient, or warm it up longer "
        "(warmup.discriminator_only_steps, discriminator.lm_steps).",
        low=0.5,
    ),
    Bound(
        "group/zero_variance_fraction",
        "Most groups teach nothing",
        "All scores are equal in a share of {} of the groups.",
        "The samples of a group are copies of each other, or the discriminator sees no difference "
        "between them.",
        "Raise sampling.temperature or gad.group_size; if the samples do differ, the discriminator "
        "needs a longer warmup.",
        high=0.5,
    ),
    Bound(
        "rollout/length_ratio",
        "The samples are much shorter than the teacher's answers",
        "Length ratio {}; 0.7 to 1.4 is usual.",
        "Length may be what the discriminator reads, or the student stops too early.",
        "See in the samples where they stop; raise gad.kl_coefficient if the length fell "
        "during GAD, or train the warmup longer if it was short from the start.",
        low=0.7,
    ),
    Bound(
        "rollout/length_ratio",
        "The samples are much longer than the teacher's answers",
        "Length ratio {}; 0.7 to 1.4 is usual.",
        "Length may be what the discriminator reads, or the student has not learned to end.",
        "Compare the shares of finished answers; raise gad.kl_coefficient if the length grew "
        "during GAD, or train the warmup longer if it was long from the start.",
        high=1.4,
    ),
    Bound(
        "student/entropy_nats",
        "The student hardly varies its answers any more",
        "Entropy {} nats a token; below 0.1 there is about one answer a prompt.",
        "Collapse onto a few answers the discriminator likes, or a task that leaves no choice.",
        "Raise gad.kl_coefficient or sampling.temperature, or stop earlier.",
        low=0.1,
    ),
    Bound(
        "detail/sampler_gap_nats",
        "The sampler and the trainer disagree",
        "Their log-probabilities of the same tokens differ by {} nats on average; at one update a "
        "batch they should be equal but for rounding, 0.01 at most.",
        "Another number type, old weights in the sampler, or log-probabilities taken before the temperature.",
        "Use one dtype for both. If the gap stays, report it: the loss takes the two as equal.",
        high=0.01,
    ),
)


def remarks(evidence: Evidence) -> list[Remark]:
    """Every remark that applies, those on the trust in the result first."""
    return [remark for check in CHECKS for remark in check(evidence)]


def _no_equal_time_baseline(evidence: Evidence) -> Iterator[Remark]:
    models = evidence.evaluation or evidence.stages
    if "gad" in models and "seqkd-equal-time" not in models:
        yield Remark(
            "No baseline had as much time as GAD",
            "SeqKD at equal time is not among the models compared.",
            "seqkd.equal_time is off by default. Longer SFT alone may give the same gain, so none "
            "can be claimed.",
            "Run gadfly seqkd-equal-time, then generate and report again.",
        )


def _few_steps(evidence: Evidence) -> Iterator[Remark]:
    stage, settings = evidence.stages.get("gad"), evidence.recipe.gad
    if stage and stage.seconds is not None and stage.steps < _FEW_STEPS:
        yield Remark(
            "GAD was short",
            f"{counted(stage.steps, 'step')} of {counted(settings.batch_prompts, 'prompt')}, "
            f"below {_FEW_STEPS} steps.",
            "Few prompts, a large batch, or a small max_steps.",
            "Lower gad.batch_prompts, or raise gad.epochs or gad.max_steps.",
        )


def _bounds(evidence: Evidence) -> Iterator[Remark]:
    for bound in BOUNDS:
        curve = evidence.curve("gad", bound.metric)
        if curve and not bound.low <= curve.last_quarter() < bound.high:
            seen = bound.evidence.format(number(curve.last_quarter()))
            yield Remark(bound.what, f"Last quarter of GAD: {_lower(seen)}", bound.cause, bound.change)


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _finished(evidence: Evidence) -> Iterator[Remark]:
    student = evidence.curve("gad", "rollout/finished_fraction")
    teacher = evidence.curve("gad", "detail/teacher_finished_fraction")
    if not (student and teacher):
        return
    ours, theirs = student.last_quarter(), teacher.last_quarter()
    if ours < theirs - _FINISHED_BELOW_TEACHER:
        yield Remark(
            "The student is cut off far more often than the teacher",
            f"Last quarter of GAD: {number(ours)} of the samples end within the cap, "
            f"{number(theirs)} of the teacher's answers.",
            "The cap is too short for the student, or it never learned to end; the discriminator "
            "can then tell by the ending alone.",
            "Raise sampling.max_response_tokens, or train the warmup longer.",
        )


def _memorising(evidence: Evidence) -> Iterator[Remark]:
    fresh = evidence.curve("gad", "discriminator/accuracy")
    probe = evidence.curve("gad", "probe/accuracy")
    if fresh and probe and probe.last_quarter() < fresh.last_quarter() - _PROBE_BELOW_FRESH:
        yield Remark(
            "The discriminator does worse on held-out prompts",
            f"Last quarter of GAD: accuracy {number(probe.last_quarter())} on the frozen probe, "
            f"{number(fresh.last_quarter())} on fresh pairs.",
            "It memorises the answers to the training prompts, or forgets the early student.",
            "Use more prompts, fewer epochs, or a lower gad.discriminator_learning_rate.",
        )


def _drift(evidence: Evidence) -> Iterator[Remark]:
    curve = evidence.curve("gad", "student/kl_nats")
    if curve is None:
        return
    early, late = curve.second_quarter(), curve.last_quarter()
    if late > _KL_NATS and late > _KL_GROWTH * early:
        yield Remark(
            "The student drifts away faster and faster",
            f"KL to the student after warmup: {number(early)} nats a token in the second quarter "
            f"of GAD, {number(late)} in the last.",
            "The student runs after what the discriminator likes at the moment, and its language suffers.",
            "Raise gad.kl_coefficient (0.03 to 0.1 kept small models in place), or lower gad.learning_rate.",
        )


def _repetition(evidence: Evidence) -> Iterator[Remark]:
    curve = evidence.curve("gad", "evaluation/repetition")
    if curve and curve.last_quarter() > curve.values[0] + _REPETITION_RISE:
        yield Remark(
            "Greedy answers repeat themselves more than before GAD",
            f"Repeated 4-grams: {number(curve.values[0])} of all at the start, "
            f"{number(curve.last_quarter())} in the last quarter.",
            "Loops please the discriminator, or the student no longer knows where to end.",
            "Read the samples below; raise gad.kl_coefficient, or go back with gad.start_from.",
        )


def _not_finite(evidence: Evidence) -> Iterator[Remark]:
    for stage, curves in evidence.curves.items():
        lost = {name: curve.num_not_finite for name, curve in curves.items()}
        found = [f"{name}: {counted(count, 'value')}" for name, count in lost.items() if count]
        if found:
            yield Remark(
                f"{stage_label(stage)} logged values that are no finite number",
                f"{'; '.join(found)}. The curves leave them out.",
                "A metric over nothing, or numbers beyond the range of their type.",
                'If it is a loss or a gradient, lower the learning rate or use dtype = "float32".',
            )


def _other_settings(evidence: Evidence) -> Iterator[Remark]:
    now = evidence.recipe.model_dump(mode="json")
    for role in ("student", "discriminator"):
        now[role]["model"] = model_identity(now[role]["model"])
    for stage in evidence.stages.values():
        changes = list(differences(*_shared(stage.settings, now)))
        if changes:
            yield Remark(
                f"{stage_label(stage.name)} ran with other settings than this page shows",
                f"{'; '.join(changes)}.",
                "The recipe was edited, or the report was given other key=value settings.",
                "Put the settings back and write the report again.",
            )


def _shared(begun: Record, now: Record) -> tuple[Record, Record]:
    """Two records cut down to the keys they share: a stage notes only its own sections."""
    old: Record = {}
    new: Record = {}
    for key in begun.keys() & now.keys():
        before, after = begun[key], now[key]
        if isinstance(before, dict) and isinstance(after, dict):
            before, after = _shared(before, after)
        old[key], new[key] = before, after
    return old, new


def _bad_rows(evidence: Evidence) -> Iterator[Remark]:
    for name, facts in evidence.data.items():
        bad = facts["bad"]
        if bad:
            kinds = ", ".join(f"{reason} {count:,}" for reason, count in sorted(bad.items()))
            left_out = counted(sum(bad.values()), "row")
            yield Remark(
                f"Rows of the {name} data were left out",
                f"{left_out} left out, {facts['rows']:,} used: {kinds}.",
                "The file holds rows that cannot be used as they are.",
                "Each is listed with its line in bad_rows.jsonl; mend or remove them.",
            )


CHECKS: tuple[Callable[[Evidence], Iterator[Remark]], ...] = (
    _no_equal_time_baseline,
    _few_steps,
    _bounds,
    _finished,
    _memorising,
    _drift,
    _repetition,
    _not_finite,
    _other_settings,
    _bad_rows,
)
NUM_CHECKS = len(CHECKS) - 1 + len(BOUNDS)
