"""The table of faults, as Markdown: what found each, after how many steps, and what else was said."""

from collections.abc import Sequence

from experiments.faults.fault import Fault, Outcome, Sight

HEAD = (
    "| fault | planted in | found by | steps until | bound | also true of it | false alarms |",
    "|---|---|---|---:|---:|---|---|",
)
CLEAN_HEAD = (
    "| clean seed | steps | alarms | findings of the audit |",
    "|---|---:|---|---|",
)

_BY = {"config": "the check of the recipe", "load": "the check of a checkpoint"}


def line(fault: Fault, outcome: Outcome) -> str:
    """The row of a fault."""
    found = outcome.of(fault)
    if found is None:
        by, step = "**nothing**", f"(of {outcome.steps})"
    elif found.by == "audit":
        by, step = f"audit `{found.name}`{'' if found.is_mechanical else ' (warns)'}", "0"
    else:
        by, step = _BY.get(found.by, f"alarm `{found.name}`"), str(found.step)
    also, false = _named(outcome.consequences(fault)), _named(outcome.false(fault))
    return f"| {fault.name} | {fault.where} | {by} | {step} | {fault.within} | {also} | {false} |"


def clean_line(seed: int, outcome: Outcome) -> str:
    """The row of a clean run."""
    alarms = ", ".join(f"`{s.name}` ({s.stage} {s.step})" for s in outcome.sights if s.by == "alarm")
    others = ", ".join(f"`{s.name}`" for s in outcome.sights if s.by != "alarm")
    return f"| {seed} | {outcome.steps} | {alarms or 'none'} | {others or 'none'} |"


def _named(sights: Sequence[Sight]) -> str:
    return ", ".join(f"`{sight.name}` ({sight.step})" for sight in sights) or "none"
