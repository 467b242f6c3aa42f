"""A run folder that many processes have in common: the first one reads and writes, all get what it read."""

import contextlib
from collections.abc import Callable, Iterator

from gadfly.distributed.processes import Processes
from gadfly.run_folder import Record, RunFolder


class SharedRunFolder(RunFolder):
    """As `RunFolder`; every process makes the same calls, and each call is done once.

    So no process decides by a file that another is just writing, and an error in one is an error in all.
    """

    def __init__(self, own: RunFolder, processes: Processes):
        super().__init__(own.path)
        self._own, self._processes = own, processes

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder while inside."""
        with contextlib.ExitStack() as held:
            self._processes.once("the run folder", lambda: held.enter_context(self._own.lock()))
            yield

    def read_json(self, name: str) -> Record:
        """A JSON file of the folder; empty if it is not there."""
        return self._processes.once(name, lambda: self._own.read_json(name))

    def write_json(self, name: str, content: Record) -> None:
        """Write a JSON file whole."""
        self._processes.once(name, lambda: self._own.write_json(name, content))

    def update_summary(self, section: str, content: Record) -> None:
        """Merge `content` into one section of `summary.json`."""
        self._processes.once("summary.json", lambda: self._own.update_summary(section, content))

    def replace_in_summary(self, section: str, content: Record) -> None:
        """Put entries into one section of `summary.json`, each in place of what it held before."""
        self._processes.once("summary.json", lambda: self._own.replace_in_summary(section, content))

    def rows(self, name: str) -> list[Record]:
        """All rows of a JSONL file."""
        return self._processes.once(name, lambda: self._own.rows(name))

    def append_rows(self, name: str, rows: list[Record]) -> None:
        """Add rows to a JSONL file."""
        self._processes.once(name, lambda: self._own.append_rows(name, rows))

    def write_rows(self, name: str, rows: list[Record]) -> None:
        """Write a JSONL file whole."""
        self._processes.once(name, lambda: self._own.write_rows(name, rows))

    def keep_rows(self, name: str, keep: Callable[[Record], bool]) -> None:
        """Drop the rows of a JSONL file that `keep` refuses."""
        self._processes.once(name, lambda: self._own.keep_rows(name, keep))

    def is_done(self, stage: str) -> bool:
        """Whether a training stage has run to its end and its last checkpoint is there."""
        return self._processes.once(stage, lambda: self._own.is_done(stage))

    def begin(self, stage: str, settings: Record) -> bool:
        """Note what a stage is run with, or check that it is what the stage was begun with."""
        return self._processes.once(stage, lambda: self._own.begin(stage, settings))

    def finish(self, stage: str, **facts: object) -> None:
        """Put a stage's steps and seconds into `summary.json`, then mark it as done."""
        self._processes.once(stage, lambda: self._own.finish(stage, **facts))

    def check_free_space(self, needed_bytes: int) -> None:
        """Refuse to start a write that the disk cannot hold."""
        self._processes.once("free space", lambda: self._own.check_free_space(needed_bytes))
