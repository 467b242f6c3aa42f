"""What looks unusual in how GAD trained, beyond the bounds of single metrics."""

from collections.abc import Iterator

from gadfly.stages.report.deciding import FEW_CASES
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.remarks.remark import Remark
from gadfly.stages.report.wording import counted, number, stage_label

_FINISHED_BELOW_TEACHER = 0.1
_PROBE_BELOW_FRESH = 0.1
# In the last quarter, and in multiples of the second: steady growth from 0 makes 2.3.
_KL_NATS, _KL_GROWTH = 0.1, 3.0
_REPETITION_RISE = 0.05
_FEW_STEPS = 100


def few_steps(evidence: Evidence) -> Iterator[Remark]:
    """GAD took too few steps to say much."""
    stage = evidence.stages.get("gad")
    if stage and stage.seconds is not None and stage.steps < _FEW_STEPS:
        yield Remark(
            "GAD was short",
            f"{counted(stage.steps, 'step')} of {counted(evidence.batch_prompts, 'prompt')}, "
            f"below {_FEW_STEPS} steps.",
            "Few prompts, a large batch, or a small max_steps.",
            "Lower gad.batch_prompts, or raise gad.epochs or gad.max_steps.",
        )


def cut_off(evidence: Evidence) -> Iterator[Remark]:
    """The student's samples end by themselves far more rarely than the teacher's answers."""
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


def few_held_out(evidence: Evidence) -> Iterator[Remark]:
    """A handful of prompts: accuracy on them moves by large steps and says little."""
    measured = [evidence.curve("gad", name) for name in ("probe/accuracy", "evaluation/repetition")]
    if any(measured) and evidence.held_out_prompts < FEW_CASES:
        yield Remark(
            "Few prompts are held out",
            f"What is measured on held-out prompts while training rests on n = {evidence.held_out_prompts}; "
            f"below {FEW_CASES} no remark is made of it.",
            "Few rows, a small data.valid_share, or a small evaluation.prompts.",
            "Raise data.valid_share, give data.valid, or raise evaluation.prompts.",
        )


def memorising(evidence: Evidence) -> Iterator[Remark]:
    """Accuracy on the frozen probe far below that on fresh pairs, if the probe is large enough to tell."""
    fresh = evidence.curve("gad", "discriminator/accuracy")
    probe = evidence.curve("gad", "probe/accuracy")
    if not (fresh and probe) or evidence.held_out_prompts < FEW_CASES:
        return
    if probe.last_quarter() < fresh.last_quarter() - _PROBE_BELOW_FRESH:
        yield Remark(
            "The discriminator does worse on held-out prompts",
            f"Last quarter of GAD: accuracy {number(probe.last_quarter())} on the frozen probe "
            f"(n = {evidence.held_out_prompts:,} prompts), {number(fresh.last_quarter())} on fresh pairs.",
            "It memorises the answers to the training prompts, or forgets the early student.",
            "Use more prompts, fewer epochs, or a lower gad.discriminator_learning_rate.",
        )


def drift(evidence: Evidence) -> Iterator[Remark]:
    """KL to the start that grows faster than steadily."""
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


def repetition(evidence: Evidence) -> Iterator[Remark]:
    """Loops in the greedy held-out answers that were not there before GAD."""
    curve = evidence.curve("gad", "evaluation/repetition")
    if curve is None or evidence.held_out_prompts < FEW_CASES:
        return
    if curve.last_quarter() > curve.values[0] + _REPETITION_RISE:
        yield Remark(
            "Greedy answers repeat themselves more than before GAD",
            f"Repeated 4-grams: {number(curve.values[0])} of all at the start, "
            f"{number(curve.last_quarter())} in the last quarter "
            f"(n = {evidence.held_out_prompts:,} prompts).",
            "Loops please the discriminator, or the student no longer knows where to end.",
            "Read the samples below; raise gad.kl_coefficient, or go back with gad.start_from.",
        )


def not_finite(evidence: Evidence) -> Iterator[Remark]:
    """Values of metrics that the curves had to leave out."""
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
