"""Checkpoints: written beside their place and renamed whole, with a manifest of hashes that is
checked at load.

STAGE/step-000400/student        an ordinary Hugging Face folder
                 /discriminator  the same, the score head included
                 /trainer        optimisers (`tensor_files.py`), and the groups to replay
                 /manifest.json  step, facts, and a hash of every file (`manifest.py`)
STAGE/latest, STAGE/best         links
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from gadfly.disk_refusals import refusal_in
from gadfly.distributed.growth import growth_as_progress
from gadfly.distributed.processes import Processes
from gadfly.errors import CheckpointError, RunFolderError
from gadfly.late_files import await_files, sizes
from gadfly.manifest import MANIFEST, check_files, read_manifest, write_manifest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole on disk.

    Attributes:
        path: its folder.
        step: the last step that went into it.
        facts: what else the trainer must know to go on (JSON).
        digest: a hash over the files of the models: equal for equal models.
    """

    path: Path
    step: int
    facts: dict[str, Any]
    digest: str


def save_checkpoint(
    stage: Path,
    step: int,
    write: Callable[[Path], Iterable[Path]],
    facts: Mapping[str, Any],
    processes: Processes | None = None,
) -> Checkpoint:
    """Let `write` fill a folder beside the stage's checkpoints, then rename it into place, as the `latest`.

    Args:
        stage: the folder of the stage.
        step: the last step that went into it.
        write: fills the folder with this process's part. Gives the files that only this process may see yet,
            as on a network file system; the first process waits for them.
        facts: what else the trainer must know to go on (JSON).
        processes: who works on it; all have to see the folder.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    processes = processes or Processes()
    place = _place(stage, step)
    beside = stage / f".{place.name}.tmp"

    def begin() -> None:
        with _explain_refusals(place):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

    def fill() -> dict[str, int]:
        with _explain_refusals(place), growth_as_progress(beside, processes):
            return sizes(beside, write(beside))

    def finish(parts: list[dict[str, int]]) -> Checkpoint:
        with _explain_refusals(place):
            for part in parts:
                await_files(beside, part)
            # A folder's list may be older than what is in it.
            listed = {path.relative_to(beside).as_posix() for path in beside.rglob("*") if path.is_file()}
            manifest = write_manifest(beside, step, facts, listed.union(*parts))
            if place.exists():
                _delete(place)
            os.replace(beside, place)
            point(stage / "latest", place)
            return Checkpoint(place, step, manifest.facts, manifest.models_digest)

    try:
        processes.once("a place for the checkpoint", begin)
        parts = processes.gather("files of the checkpoint", processes.together("checkpoint", fill))
        # Hashing a large one takes its time.
        return processes.once("the end of the checkpoint", lambda: finish(parts), is_patient=True)
    # The second is torch's, and no `Exception`.
    except (Exception, CheckpointException):
        # By one process: what others still write would fail by this, and hide the cause.
        if processes.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise


@contextlib.contextmanager
def _explain_refusals(place: Path) -> Iterator[None]:
    """Say in a line that a disk or a folder refused a checkpoint, and why."""
    try:
        yield
    except (Exception, CheckpointException) as failure:
        if (reason := refusal_in(failure)) is None:
            raise
        raise RunFolderError(
            f"{place}: the checkpoint could not be written ({reason}); earlier ones are untouched. "
            f"Make room or mend the folder, and run the same command to go on."
        ) from failure


def _place(stage: Path, step: int) -> Path:
    return stage / f"step-{step:06d}"


def _delete(folder: Path) -> None:
    """Delete a folder so that a kill in between leaves no half of it in its place."""
    beside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(beside, ignore_errors=True)
    os.replace(folder, beside)
    shutil.rmtree(beside)


def point(link: Path, target: Path) -> None:
    """Make `link` a link to its neighbour `target`, at one stroke."""
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target.name)
    os.replace(beside, link)


def checkpoint_steps(stage: Path) -> list[int]:
    """Steps of the checkpoints of a stage, oldest first."""
    steps = (_step_named(path) for path in stage.glob("step-*"))
    return sorted(step for step in steps if step is not None)


def _step_named(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named by; None for another folder."""
    name = re.fullmatch(r"step-(\d{6,})", folder.name, re.ASCII)
    return int(name[1]) if name else None


def latest_checkpoint(stage: Path, processes: Processes | None = None) -> Checkpoint | None:
    """The newest checkpoint of a stage, checked, by the first of the processes; None if there is none."""

    def find() -> Checkpoint | None:
        steps = checkpoint_steps(stage)
        return open_checkpoint(_place(stage, steps[-1])) if steps else None

    return (processes or Processes()).once(f"the checkpoints of {stage.name}", find, is_patient=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, after a check of every file against the manifest.

    Raises:
        CheckpointError: naming the file that is missing, altered, or was not saved with it.
    """
    try:
        path = path.resolve()
        is_there = path.is_dir()
    # A link to itself, a name too long, a null byte.
    except (OSError, RuntimeError, ValueError):
        is_there = False
    if not is_there:
        raise CheckpointError(f"{path}: no such checkpoint; give a folder such as RUN/gad/step-000400")
    way_out = _way_out(path)
    manifest = read_manifest(path, way_out)
    named = _step_named(path)
    if named is not None and named != manifest.step:
        raise CheckpointError(
            f"{path / MANIFEST}: of step {manifest.step}, in a folder of step {named}{way_out}"
        )
    check_files(path, manifest, way_out)
    return Checkpoint(path, manifest.step, manifest.facts, manifest.models_digest)


def student_of(name: str) -> str:
    """What to open for a student: that of a checkpoint, checked; any other name is a model's already.

    Args:
        name: a stage of a run, for its latest checkpoint; a checkpoint; or a model's folder or name.

    Raises:
        CheckpointError: naming the file that is missing or altered.
    """
    path = Path(name)
    if (path / "latest").exists():
        path /= "latest"
    return str(open_checkpoint(path).path / "student") if (path / MANIFEST).exists() else name


def _way_out(path: Path) -> str:
    """What to do about a damaged checkpoint. A folder that is none of ours is never to be deleted."""
    steps = checkpoint_steps(path.parent)
    own = [step for step in steps if _place(path.parent, step) == path]
    if not own:
        return "; give a folder such as RUN/gad/step-000400"
    earlier = [step for step in steps if step < own[0]]
    rest = f"step {earlier[-1]}" if earlier else "the stage's start"
    return f"; restore it, or delete {path} to go on from {rest}"


def prune_checkpoints(stage: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest checkpoints and the best one."""
    for step in checkpoint_steps(stage)[:-keep_last]:
        if step != best_step:
            _delete(_place(stage, step))


def drop_checkpoints_after(stage: Path, step: int) -> None:
    """Delete the checkpoints newer than a step, to go on from there."""
    for newer in reversed(checkpoint_steps(stage)):
        if newer > step:
            _delete(_place(stage, newer))
    remove_unfinished(stage)


def remove_unfinished(stage: Path) -> None:
    """Delete what a kill in mid-save left behind, and put the links right."""
    for path in stage.glob(".step-*"):
        shutil.rmtree(path)
    steps = checkpoint_steps(stage)
    if steps:
        point(stage / "latest", _place(stage, steps[-1]))
    for link in (stage / "latest", stage / "best"):
        if link.is_symlink() and not link.exists():
            link.unlink()
