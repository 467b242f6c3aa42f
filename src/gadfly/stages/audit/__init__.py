"""The audit: what a discriminator could tell the roles by without reading, found before it is trained.

`audit` looks at the data, the untrained student and the discriminator's rendering; `audit-warmup` asks the
same of the student that warmup made. Nothing is trained. Result: a part of `audit.json` each, a section of
the report, and an error where a mechanical cause stands that `audit.allow` does not name.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gadfly.checkpoint import Checkpoint, latest_checkpoint
from gadfly.data.dataset import load_rows
from gadfly.errors import AlarmError, CheckpointError
from gadfly.records import Row
from gadfly.stages.audit.estimate import OF_THE_DISK, Pace, estimate, size_findings
from gadfly.stages.audit.looking import look
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.json"

# Of the teacher's answers. Who has learnt from fewer is untrained still, as in a run to try things out.
_TRAINED_ON = 500


def audit(run: Run) -> None:
    """Look at data, template, tokenizer and the untrained student's samples, before anything is trained.

    Raises:
        AlarmError: for mechanical causes that `audit.allow` does not name.
    """
    _audit(run, "audit", None)


def audit_warmup(run: Run) -> None:
    """Look again, at samples of the student that warmup made and at the discriminator it made.

    Raises:
        AlarmError: for mechanical causes that `audit.allow` does not name.
        CheckpointError: if there is no such student.
    """
    checkpoint = latest_checkpoint(run.folder.stage("warmup"))
    if checkpoint is None:
        raise CheckpointError(
            f"audit-warmup: no checkpoint under {run.folder.stage('warmup')}; run `gadfly warmup` first"
        )
    _audit(run, "audit-warmup", checkpoint)


def _audit(run: Run, stage: str, checkpoint: Checkpoint | None) -> None:
    sets = {name: load_rows(files, needs_response=False).rows for name, files in run.recipe.data.test.items()}
    settings = _settings(run, sets, checkpoint)
    found = run.folder.read_json(AUDIT_FILE).get(stage, {})
    is_done = found.get("settings") == settings and "pace" in found
    if not is_done:
        found = look(run, stage, sets, _folder(checkpoint), is_trained=_is_trained(run, checkpoint))
        found["settings"] = settings
    # Each time: it hangs on settings that what was looked at does not, and on the disk as it is now.
    estimated, before = estimate(run, Pace(**found["pace"])), found
    looked_at = [finding for finding in found["findings"] if finding["name"] != "does-not-fit"]
    fits = [finding.as_record() for finding in size_findings(estimated)]
    found = {**found, "estimate": estimated, "findings": [*looked_at, *fits]}
    if not is_done or _but_for_the_disk(found) != _but_for_the_disk(before):
        run.folder.write_json(AUDIT_FILE, {**run.folder.read_json(AUDIT_FILE), stage: found})
    _warn(stage, fits if is_done else found["findings"])
    if is_done:
        logger.info("%s: done already", stage)
    else:
        logger.info("%s: %d findings (%s)", stage, len(found["findings"]), AUDIT_FILE)
    stopping = [
        f"{finding['name']} ({finding['evidence']})"
        for finding in found["findings"]
        if finding["mechanical"] and finding["name"] not in run.recipe.audit.allow
    ]
    if stopping:
        raise AlarmError(
            f"{stage}: {'; '.join(stopping)}: no training mends that. {run.folder.path / AUDIT_FILE} says "
            f"what to do; to go on nonetheless, name the findings in audit.allow."
        )


def _but_for_the_disk(found: dict[str, Any]) -> dict[str, Any]:
    """Which is another at every look, and no reason to write."""
    estimated = {key: value for key, value in found["estimate"].items() if key not in OF_THE_DISK}
    return {**found, "estimate": estimated}


def _settings(run: Run, sets: dict[str, tuple[Row, ...]], checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What decides the result: data, models, caps. What is allowed can be changed without looking again."""
    settings = run.stage_settings("discriminator", "audit")
    del settings["audit"]["allow"]
    settings["test"] = {name: [[row.id, row.prompt] for row in rows] for name, rows in sets.items()}
    settings["student"]["checkpoint"] = checkpoint.digest if checkpoint else None
    settings["precision"] = None
    return {"digest": _digest(settings)}


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _folder(checkpoint: Checkpoint | None) -> Path | None:
    return checkpoint.path if checkpoint else None


def _is_trained(run: Run, checkpoint: Checkpoint | None) -> bool:
    if checkpoint is None:
        return False
    warmup = run.recipe.warmup
    steps = checkpoint.step - warmup.discriminator_only_steps - warmup.discriminator_final_steps
    return steps * warmup.batch_prompts >= _TRAINED_ON


def _warn(stage: str, findings: Sequence[dict[str, Any]]) -> None:
    for finding in findings:
        kind = "mechanical" if finding["mechanical"] else "warning"
        logger.warning(
            "%s: %s (%s): %s: %s", stage, finding["name"], kind, finding["what"], finding["evidence"]
        )
