"""What a run folder holds, kept up to date by looking again."""

import os
import time
from pathlib import Path
from typing import Any

from gadfly.alarms import History
from gadfly.config import TRAINING_STAGES
from gadfly.errors import RunFolderError
from gadfly.run_folder import Record, RunFolder
from gadfly.stages.watch.tail import Tail
from gadfly.stored_json import check_fields

# Rows of samples and alarms that are kept for the screen.
_KEPT = 20
# Steps that tell the pace.
_PACE_STEPS = 50
# A run on another machine shows itself by rows that are no older than this, in seconds.
_FRESH_SECONDS = 120.0
# Seconds since 1970; and steps, which no run has.
_END_OF_TIME, _MOST_STEPS = 1e11, 10**12


class Watched:
    """A run folder as it is now.

    Attributes:
        path: the folder.
        name: the run's.
        histories: by stage, in the order they were begun.
        alarms: the newest last.
        remedies: what stages went back for.
        samples: the newest last.

    Raises:
        RunFolderError: there is no run folder there, or a file of it is not valid.
    """

    def __init__(self, path: Path):
        self.path = path
        self._folder = RunFolder(path)
        config = self._folder.read_json("config.json")
        if not config:
            raise RunFolderError(f"{path}: no run folder (no config.json); give a folder such as runs/NAME")
        self.name = str(config.get("name", path.name))
        self.histories: dict[str, History] = {}
        self.alarms: list[Record] = []
        self.remedies: list[Record] = []
        self.samples: list[Record] = []
        self._stages: dict[str, Record] = {}
        self._times: dict[str, list[tuple[int, float]]] = {}
        self._last_row = 0.0
        self._tails = {name: Tail(path / f"{name}.jsonl") for name in ("metrics", "alarms", "samples")}
        self.look()

    def look(self) -> None:
        """Read what was written since the last look."""
        anew, rows = self._tails["metrics"].read()
        if anew:
            self.histories, self._times = {}, {}
        for row in rows:
            self._add(row)
        for name in ("alarms", "samples"):
            anew, rows = self._tails[name].read()
            kept = [] if anew else getattr(self, name)
            setattr(self, name, [*kept, *rows][-_KEPT:])
        # A name from a row is no path to follow.
        stages = [name for name in TRAINING_STAGES if name in self.histories]
        self._stages = {name: self._folder.read_json(f"{name}/stage.json") for name in stages}
        self.remedies = [row for name in stages for row in self._folder.rows(f"{name}/remedies.jsonl")]

    def _add(self, row: Record) -> None:
        stage = str(row.get("stage", ""))
        try:
            check_fields(row, {"step": int})
        except ValueError as wrong:
            raise RunFolderError(f"{self.path / 'metrics.jsonl'}: {wrong}; mend or delete that row") from None
        self.histories.setdefault(stage, History(stage)).add(row)
        at = row.get("time/unix")
        # Neither a number that is none, nor one beyond all clocks.
        if isinstance(at, int | float) and 0 <= at < _END_OF_TIME:
            self._last_row = float(at)
            times = self._times.setdefault(stage, [])
            if not times or times[-1][0] != row["step"]:
                times.append((row["step"], float(at)))
            del times[:-_PACE_STEPS]

    @property
    def stage(self) -> str | None:
        """The stage that logged last; None before the first row."""
        newest = [name for name, history in self.histories.items() if history.newest]
        return max(newest, key=self._newest_time, default=None)

    def _newest_time(self, stage: str) -> float:
        return self._times[stage][-1][1] if self._times.get(stage) else 0.0

    def is_done(self, stage: str) -> bool:
        """Whether a stage has run to its end."""
        return bool(self._stages.get(stage, {}).get("done"))

    def total_steps(self, stage: str) -> int | None:
        """Steps of a stage in all; None where it does not say."""
        total: Any = self._stages.get(stage, {}).get("total_steps")
        return total if isinstance(total, int) and 0 < total < _MOST_STEPS else None

    def seconds_left(self, stage: str) -> float | None:
        """What is left of a stage at the pace of its last steps; None where that cannot be said."""
        times, total = self._times.get(stage, []), self.total_steps(stage)
        if total is None or len(times) < 2 or times[-1][0] <= times[0][0]:
            return None
        pace = (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])
        return max(0.0, pace * (total - times[-1][0]))

    @property
    def seconds_since_row(self) -> float | None:
        """Time since the newest row; None before the first."""
        return max(0.0, time.time() - self._last_row) if self._last_row else None

    @property
    def is_running(self) -> bool:
        """Whether the process that owns the folder lives; one elsewhere shows itself by what it writes."""
        since = self.seconds_since_row
        is_fresh = since is not None and since < _FRESH_SECONDS
        return _lives(self.path / ".lock") or (is_fresh and not self._ended)

    @property
    def _ended(self) -> bool:
        return all(self.is_done(name) for name in self.histories)


def _lives(lock: Path) -> bool:
    """Whether the process whose number is in a lock file is there; the lock itself is left alone."""
    try:
        number = int(lock.read_text(encoding="utf-8"))
        os.kill(number, 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return number > 0
