"""The alarms a run raised, each with what was seen, the likely cause, what to change and what was done."""

from dataclasses import dataclass

from gadfly.alarms import KINDS
from gadfly.run_folder import Record
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.wording import counted, stage_label

_ACTIONS = {
    "warn": "",
    "skip_discriminator": "The discriminator took no step while it stood.",
    "stop": "The stage stopped there.",
    "roll_back": "The stage went back to before it.",
}


@dataclass(frozen=True)
class Raised:
    """One alarm of one stage, however often it was raised."""

    title: str
    name: str
    where: str
    evidence: str
    cause: str
    advice: str
    done: str


def raised(evidence: Evidence) -> list[Raised]:
    """The alarms in the order they were first raised; those a stage went back for are told as such."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in evidence.alarms:
        groups.setdefault((row["stage"], row["name"]), []).append(row)
    return [*(_went_back(row) for row in evidence.remedies), *(_raised(rows) for rows in groups.values())]


def _raised(rows: list[Record]) -> Raised:
    first, last = rows[0], rows[-1]
    where = f"{stage_label(first['stage'])}, step {first['step']:,}"
    if last is not first:
        where += f", and again up to step {last['step']:,}"
    return Raised(
        title=_title(first["name"]),
        name=first["name"],
        where=where,
        evidence=last["evidence"],
        cause=last["cause"],
        advice=last["advice"],
        done=_ACTIONS.get(last["action"], ""),
    )


def _went_back(row: Record) -> Raised:
    changes = ", ".join(f"{key} = {value:g}" for key, value in row["changes"].items())
    back = f"to step {row['back_to']:,}" if row["back_to"] else "to its start"
    lost = counted(row["step"] - row["back_to"], "step")
    return Raised(
        title=_title(row["name"]),
        name=row["name"],
        where=f"{stage_label(row['stage'])}, step {row['step']:,}",
        evidence=row["evidence"],
        cause=row["cause"],
        advice=row["advice"],
        done=f"The stage went back {lost}, {back}, and on with {changes}.",
    )


def _title(name: str) -> str:
    return KINDS[name].title if name in KINDS else name
