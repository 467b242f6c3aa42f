"""Where GAD was too short, or its held-out prompts too few, to say much.

What goes wrong in its course is said by the alarms.
"""

from collections.abc import Iterator

from gadfly.stages.report.deciding import FEW_CASES
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.remarks.remark import Remark
from gadfly.stages.report.wording import counted

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


def few_held_out(evidence: Evidence) -> Iterator[Remark]:
    """A handful of prompts: accuracy on them moves by large steps and says little."""
    measured = [evidence.curve("gad", name) for name in ("probe/accuracy", "evaluation/repetition")]
    if any(measured) and evidence.held_out_prompts < FEW_CASES:
        yield Remark(
            "Few prompts are held out",
            f"What is measured on held-out prompts while training rests on n = {evidence.held_out_prompts}; "
            f"below {FEW_CASES} no alarm is raised by it.",
            "Few rows, a small data.valid_share, or a small evaluation.prompts.",
            "Raise data.valid_share, give data.valid, or raise evaluation.prompts.",
        )
