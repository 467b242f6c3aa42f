"""The run folder: who owns it, how files get there whole, and which stage is done.

A file is written beside its place and renamed, so a kill at any moment leaves the old one or the new one.
Rows are appended; the half row that a kill may leave is never read, and goes with the next append.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from gadfly.errors import RunFolderError
from gadfly.run_files import check_object, check_row
from gadfly.stage_settings import differences
from gadfly.stored_json import parse_object

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class RunFolder:
    """`runs/NAME`, with one owner at a time.

    Example:
        >>> import tempfile
        >>> run = RunFolder(Path(tempfile.mkdtemp()) / "a")
        >>> with run.lock():
        ...     run.write_json("summary.json", {"steps": 3})
        >>> run.read_json("summary.json")
        {'steps': 3}
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def stage(self, name: str) -> Path:
        """The folder of a stage; it need not exist."""
        return self.path / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder while inside, creating it first. The system frees it however the owner ends.

        Raises:
            RunFolderError: another process owns it, or it cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take(held.enter_context(open(self.path / ".lock", "a+b", buffering=0)))
            except OSError as failure:
                raise RunFolderError(
                    f"run_folder = {self.path}: cannot be written: {failure.strerror}; "
                    f"choose another with run_folder=…"
                ) from None
            yield

    def _take(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read(20).decode(errors="replace")
            owner = f"process {pid}" if pid else "another process"
            raise RunFolderError(
                f"run_folder = {self.path}: in use by {owner}; wait for it, stop it, or choose another name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())

    def read_json(self, name: str) -> Record:
        """A JSON file of the folder; empty if it is not there."""
        path = self.path / name
        try:
            content = parse_object(path.read_bytes())
            check_object(name, content)
        except FileNotFoundError:
            return {}
        except OSError as failure:
            raise RunFolderError(f"{path}: cannot be read: {failure.strerror}") from None
        except ValueError as invalid:
            raise RunFolderError(f"{path}: {invalid}; mend it, or delete it and run again") from None
        return content

    def write_json(self, name: str, content: Record) -> None:
        """Write a JSON file whole."""
        write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def update_summary(self, section: str, content: Record) -> None:
        """Merge `content` into one section of `summary.json`."""
        summary = self.read_json("summary.json")
        merge(summary.setdefault(section, {}), content)
        self.write_json("summary.json", summary)

    def replace_in_summary(self, section: str, content: Record) -> None:
        """Put entries into one section of `summary.json`, each in place of what it held before."""
        summary = self.read_json("summary.json")
        summary.setdefault(section, {}).update(content)
        self.write_json("summary.json", summary)

    def rows(self, name: str) -> list[Record]:
        """All rows of a JSONL file; a last line that a kill has cut is left out.

        Raises:
            RunFolderError: naming a line that is no JSON, or no row of that file.
        """
        path = self.path / name
        try:
            *lines, last = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as failure:
            raise RunFolderError(f"{path}: cannot be read: {failure.strerror}") from None
        if _is_whole(last):
            lines.append(last)
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_object(line)
                check_row(name, row)
            except ValueError as invalid:
                raise RunFolderError(f"{path}:{number}: {invalid}; mend or delete that line") from None
            rows.append(row)
        return rows

    def append_rows(self, name: str, rows: list[Record]) -> None:
        """Add rows to a JSONL file; a kill of the process after this returns does not lose them.

        Raises:
            RunFolderError: the disk is full or the file cannot be written; the rows before are untouched.
        """
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                _drop_half_row(file)
                file.write(_lines(rows).encode())
        except OSError as failure:
            raise RunFolderError(
                f"{path}: cannot be written: {failure.strerror}; the rows before are untouched. "
                f"Make room or mend the folder, and run the same command to go on."
            ) from None

    def write_rows(self, name: str, rows: list[Record]) -> None:
        """Write a JSONL file whole."""
        write_text(self.path / name, _lines(rows))

    def keep_rows(self, name: str, keep: Callable[[Record], bool]) -> None:
        """Drop the rows of a JSONL file that `keep` refuses: those a resumed stage will write again."""
        if (self.path / name).exists():
            self.write_rows(name, [row for row in self.rows(name) if keep(row)])

    def is_done(self, stage: str) -> bool:
        """Whether a training stage has run to its end and its last checkpoint is there."""
        has_checkpoint = any(self.stage(stage).glob("step-*/manifest.json"))
        return has_checkpoint and bool(self.read_json(f"{stage}/stage.json").get("done"))

    def begin(self, stage: str, settings: Record) -> bool:
        """Note what a stage is run with, or check that it is what the stage was begun with.

        Returns:
            Whether there is anything left to do; says so if there is not.

        Raises:
            RunFolderError: naming each setting that differs.
        """
        settings = json.loads(json.dumps(settings))
        begun = self.read_json(f"{stage}/stage.json")
        if not begun:
            self.forget(stage)
            self.write_json(f"{stage}/stage.json", {"settings": settings, "done": False})
            return True
        changes = list(differences(begun.get("settings") or {}, settings))
        if changes and not any(self.stage(stage).glob("step-*")):
            # Nothing was trained with the old settings yet: a slip put right is no other run.
            shutil.rmtree(self.stage(stage))
            self.write_json(f"{stage}/stage.json", {"settings": settings, "done": False})
            return True
        if changes:
            state = "finished" if begun.get("done") else "begun"
            raise RunFolderError(
                f"{self.stage(stage)}: {state} with other settings: {'; '.join(changes)}. "
                f"Put them back, choose another name, or delete that folder to do the stage again."
            )
        if not self.is_done(stage):
            if begun.get("done"):
                logger.warning("%s: done before, but its checkpoints are gone; doing it again", stage)
            return True
        steps, seconds = begun.get("steps") or 0, begun.get("seconds") or 0
        logger.info("%s: done already, %d steps in %.0f s", stage, steps, seconds)
        return False

    def forget(self, model: str) -> None:
        """Drop what was made of a model that is to be trained anew, and of its checkpoints: times, the choice
        of the best, figures, answers, verdicts.
        """
        summary = self.read_json("summary.json")
        times, figures = summary.get("stages") or {}, summary.get("evaluation") or {}
        arms = {name for name in figures if name == model or name.startswith(f"{model}/")}
        if model not in times and not arms and model not in (summary.get("best") or {}):
            return
        times.pop(model, None)
        (summary.get("best") or {}).pop(model, None)
        for test_set in {test_set for arm in arms for test_set in figures.pop(arm)}:
            for section in ("pairwise", "judge"):
                (summary.get(section) or {}).pop(test_set, None)
            # That file holds what was paid for, whatever set an older run named so.
            if test_set != "answers" and Path(test_set).name == test_set:
                (self.path / f"verdicts/{test_set}.jsonl").unlink(missing_ok=True)
            self.keep_rows(f"generations/{test_set}.jsonl", lambda row: row.get("model") not in arms)
        self.write_json("summary.json", summary)

    def finish(self, stage: str, **facts: Any) -> None:
        """Put a stage's steps and seconds into `summary.json`, then mark it as done."""
        self.replace_in_summary("stages", {stage: facts})
        begun = self.read_json(f"{stage}/stage.json")
        self.write_json(f"{stage}/stage.json", {**begun, **facts, "done": True})

    def check_free_space(self, needed_bytes: int) -> None:
        """Refuse to start a write that the disk cannot hold.

        Raises:
            RunFolderError: saying how much is free and how much is needed.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise RunFolderError(
                f"{self.path}: {free / 1e6:.0f} MB free, a checkpoint needs {needed_bytes / 1e6:.0f} MB; "
                f"make room and run the same command to go on"
            )


def merge(into: Record, piece: Record) -> None:
    """Put `piece` into `into`, table by table."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it there.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    # A report may be written beside a run that writes its own.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as failure:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise RunFolderError(
            f"{path}: cannot be written: {failure.strerror}; what was there is untouched. "
            f"Make room or mend the folder, and run the same command to go on."
        ) from None


def _lines(rows: list[Record]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _is_whole(last: bytes) -> bool:
    """Whether what follows a file's last line break is a row: editors and kills may leave out the next."""
    try:
        return bool(parse_object(last))
    except ValueError:
        return False


def _drop_half_row(file: BinaryIO) -> None:
    """Cut a JSONL file back to its last whole row, and end that with a line break."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        if _is_whole(content[end:]):
            file.write(b"\n")
        else:
            file.truncate(end)
