"""Looks at a stage's rows so far and says which alarms stand."""

from gadfly.alarms.alarm import Alarm, Kind
from gadfly.alarms.catalogue import ALARMS, KINDS
from gadfly.alarms.history import History

FEW_PROMPTS = 20
"""Fewer held-out prompts than this move by large steps and say little."""


def look(history: History, *, only_new: bool = True) -> list[Alarm]:
    """The alarms that stand at the newest row of a stage, in the order of the catalogue.

    It depends on the rows alone: a resumed run, which has the same, gets the same.

    Args:
        history: the rows so far.
        only_new: leave out alarms whose metrics the newest row does not have.

    Example:
        >>> history = History("gad")
        >>> for step in range(1, 11):
        ...     history.add({"stage": "gad", "step": step, "group/zero_variance_fraction": 0.9})
        >>> [(alarm.name, alarm.since) for alarm in look(history)]
        [('no-signal', 1)]
    """
    found = {}
    for kind in ALARMS:
        if not _is_of(kind, history):
            continue
        if only_new and kind.reads and not _has_one(history, kind.reads):
            continue
        finding = kind.find(history)
        if finding is not None:
            found[kind.name] = Alarm(
                name=kind.name,
                title=kind.title,
                step=history.step,
                since=finding.since,
                evidence=finding.evidence,
                cause=kind.cause,
                advice=kind.advice_in(history.stage),
                remedy={key.format(stage=history.stage): change for key, change in kind.remedy.items()},
            )
    return [alarm for name, alarm in found.items() if not _is_hidden(name, set(found), history)]


def silent(stage: str, held_out: int) -> list[str]:
    """The alarms that a stage cannot raise for want of held-out prompts.

    Example:
        >>> silent("seqkd", held_out=19), silent("seqkd", held_out=20)
        (['repetition'], [])
    """
    if held_out >= FEW_PROMPTS:
        return []
    return [kind.name for kind in ALARMS if kind.held_out and (not kind.stages or stage in kind.stages)]


def _is_of(kind: Kind, history: History) -> bool:
    """Whether the stage can raise the alarm at all."""
    is_of_stage = not kind.stages or history.stage in kind.stages
    return is_of_stage and not (kind.held_out and history.circumstances.held_out < FEW_PROMPTS)


def _has_one(history: History, metrics: tuple[str, ...]) -> bool:
    """Whether the newest row has one of the metrics; a name that ends in `/` means all under it."""
    return any(
        metric in history.newest
        or (metric.endswith("/") and any(name.startswith(metric) for name in history.newest))
        for metric in metrics
    )


def _is_hidden(name: str, found: set[str], history: History) -> bool:
    """Whether another alarm that stands says the same more exactly."""
    others = (KINDS[other] for other in KINDS[name].hidden_by)
    return any(
        other.name in found or (_is_of(other, history) and other.find(history) is not None)
        for other in others
    )
