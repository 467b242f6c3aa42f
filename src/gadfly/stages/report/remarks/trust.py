"""What weakens the trust in a result before any figure is read: baselines, settings, rows."""

from collections.abc import Iterator

from gadfly.run_folder import Record
from gadfly.stage_settings import differences, stage_settings
from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.remarks.remark import Remark
from gadfly.stages.report.wording import counted, stage_label


def no_equal_time_baseline(evidence: Evidence) -> Iterator[Remark]:
    """GAD without a baseline of the same cost."""
    models = evidence.evaluation or evidence.stages
    if "gad" in models and "seqkd-equal-time" not in models:
        yield Remark(
            "No baseline had as much time as GAD",
            "SeqKD at equal time is not among the models compared.",
            "seqkd.equal_time is off by default. Longer SFT alone may give the same gain, so none "
            "can be claimed.",
            "Run gadfly seqkd-equal-time, then generate and report again.",
        )


def other_settings(evidence: Evidence) -> Iterator[Remark]:
    """Settings of a stage that are not the recipe's."""
    sections = evidence.recipe.model_dump(mode="json", exclude={"name", "seed", "run_folder"})
    now = stage_settings(evidence.recipe, tuple(sections))
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


def bad_rows(evidence: Evidence) -> Iterator[Remark]:
    """Rows that could not be used."""
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
