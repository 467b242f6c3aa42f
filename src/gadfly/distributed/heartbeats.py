"""How ranks notice that one of them is gone or stuck, and say which, where, and what it was doing.

Every rank leaves a beat in the store of the launch twice a second, with what it is doing, and reads those of
the others. A rank that is killed or frozen falls silent; one that hangs beats on, but its work stands still.

The main thread tells what it meets itself (`gone`, `confess`). A wait in C, as for a GPU, meets nothing: then
the thread of the beats tells, and ends the process.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gadfly.distributed.end_requests import EndRequests

_BEAT_SECONDS = 0.5
# After a failure, a rank is taken for gone once it has been silent for this long.
_GONE_SECONDS = 3.0
# Without one: a busy machine may keep a thread from beating for a while.
_SILENT_SECONDS = 60.0
# The main thread's, to come by itself to what the thread of the beats has noticed.
_GRACE_SECONDS = 4.0
# Until the recipe is read, which says how long.
_FIRST_TIMEOUT_SECONDS = 600.0


@dataclass
class Status:
    """What this rank is doing, as the others see it.

    Attributes:
        place: where the work is, as in `gad step 7`.
        what: what is being done there.
        count: how often that has changed. All run the same program: the lowest count is furthest behind.
        moves: how often there was anything new, progress included, which need not be the same for all.
        is_patient: whether what is done may take as long as it likes.
        since: when there was last anything new, on this process's clock.
    """

    place: str = "the start"
    what: str = "nothing yet"
    count: int = 0
    moves: int = 0
    is_patient: bool = False
    since: float = field(default_factory=time.monotonic)

    def note(self, what: str, *, is_patient: bool = False) -> None:
        """Say what comes now."""
        self.is_patient = is_patient
        self.progress(what)
        self.count += 1

    def progress(self, what: str) -> None:
        """Say how far that has come."""
        self.what, self.since = what, time.monotonic()
        self.moves += 1

    def follow(self, other: "Status") -> None:
        """Say what the thread of another status has come to, for which this one waits."""
        self.is_patient = other.is_patient
        if other.since > self.since:
            self.progress(other.what)

    @contextlib.contextmanager
    def doing(self, what: str, *, is_patient: bool = False) -> Iterator[None]:
        """Say what is done inside, and afterwards that it is over."""
        self.note(what, is_patient=is_patient)
        yield
        self.note(f"what comes after {what}")

    def beside(self) -> "Status":
        """One for a thread beside the main one; nobody watches it but through `follow`."""
        return Status(self.place)


@dataclass
class _Seen:
    """The last beat of a rank, and when this one saw it, and saw it move."""

    beat: int = -1
    place: str = "the start"
    what: str = "nothing yet"
    count: int = 0
    moves: int = 0
    at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)


class Heartbeats:
    """Beats for this rank, and watches over all.

    Args:
        store: a connection that nothing else uses.
        rank: this one.
        size: ranks in all.
        status: what this rank is doing, kept up to date by others.

    Attributes:
        timeout_seconds: how long one thing may take without progress.
        requests: to end, that this process gets.
    """

    def __init__(self, store: Any, rank: int, size: int, status: Status):
        self._store, self._rank, self._size = store, rank, size
        self._status, self.timeout_seconds = status, _FIRST_TIMEOUT_SECONDS
        self.requests = EndRequests()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._main_tells = False
        self._seen = {other: _Seen() for other in range(size)}
        self._thread: threading.Thread | None = None

    def start(self, on_stuck: Callable[[str], None]) -> None:
        """Beat and watch from now on, in a thread; `on_stuck` gets the line to tell and ends the process."""
        self.requests.listen()
        thread = threading.Thread(target=self._run, args=(on_stuck,), daemon=True, name="heartbeats")
        thread.start()
        self._thread = thread

    def stop(self) -> None:
        """Fall silent."""
        self._is_over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.requests.stop()

    def meet(self, where: str) -> None:
        """Wait for the first rank to come here, however long it takes it, as long as it beats.

        Args:
            where: a name that no other meeting has.
        """
        key = f"meeting/{where}"
        if self._rank == 0:
            with self._lock:
                self._store.set(key, "")
            return
        while True:
            with self._lock:
                if self._store.check([key]):
                    return
            time.sleep(_BEAT_SECONDS)

    def confess(self, failure: str) -> bool:
        """Let the others know that this rank ends by a failure of its own. Returns whether it is to tell it.

        The first rank tells at once; another only what the first one does not come to by itself.
        """
        self._main_tells = True
        if self._rank > 0:
            time.sleep(_BEAT_SECONDS * 2)
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set("confession", f"rank {self._rank}: {failure}")
        return bool(self._claim("tell"))

    def gone(self) -> str | None:
        """Which rank is gone, as the line to tell, after having looked for some seconds; None if none is.

        The line is empty if another rank tells.
        """
        self._main_tells = True
        waited_for = self._status.what
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            while time.monotonic() < deadline:
                with self._lock:
                    if self._store.check(["confession"]):
                        return ""
                    self._look()
                if (silent := self._silent(_GONE_SECONDS)) is not None:
                    return self._claim(self._line(silent, "is gone", waited_for))
                time.sleep(_BEAT_SECONDS)
        except RuntimeError:
            return self._line_without_store(waited_for)
        return None

    def _run(self, on_stuck: Callable[[str], None]) -> None:
        beat = 0
        while not self._is_over.wait(_BEAT_SECONDS):
            beat += 1
            try:
                line = self._beat(beat, self._status)
            except RuntimeError:
                # Without the store; the end of the run may be what took it away.
                if self._is_over.wait(_GRACE_SECONDS) or self._main_tells:
                    return
                line = self._line_without_store(self._status.what)
            if line is not None:
                self._is_over.set()
                on_stuck(line)

    def _beat(self, number: int, status: Status) -> str | None:
        """Leave a beat, read those of the others, and give the line to tell if the process is to end."""
        record = json.dumps([number, status.place, status.what, status.count, status.moves])
        with self._lock:
            self._store.set(f"beat/{self._rank}", record)
            self._look()
            has_confession = self._store.check(["confession"])
        if self._main_tells:
            return None
        line = self._unheard(status, has_confession)
        return self._stuck(status) if line is None else line

    def _look(self) -> None:
        """Read the beats of all."""
        keys = [f"beat/{other}" for other in range(self._size)]
        everybody = range(self._size)
        there = (
            everybody if self._store.check(keys) else [o for o in everybody if self._store.check([keys[o]])]
        )
        for other, record in zip(there, self._store.multi_get([keys[other] for other in there]), strict=True):
            beat, place, what, count, moves = json.loads(record)
            before, now = self._seen[other], time.monotonic()
            if beat != before.beat:
                moved_at = before.moved_at if moves == before.moves else now
                self._seen[other] = _Seen(beat, place, what, count, moves, now, moved_at)

    def _silent(self, seconds: float) -> int | None:
        """The rank that has been silent for longest, if it was for so long."""
        others = [other for other in self._seen if other != self._rank]
        longest = min(others, key=lambda other: self._seen[other].at)
        return longest if time.monotonic() - self._seen[longest].at > seconds else None

    def _unheard(self, status: Status, has_confession: bool) -> str | None:
        """The line to tell if this process was to end, for the sake of another rank, and does not."""
        seconds = self.requests.seconds_since()
        # Later, others have ended too, because they were told to.
        if seconds is None or not _GONE_SECONDS < seconds < 2 * _GONE_SECONDS:
            return None
        if has_confession:
            return ""
        silent = self._silent(_GONE_SECONDS)
        return None if silent is None else self._claim(self._line(silent, "is gone", status.what))

    def _stuck(self, status: Status) -> str | None:
        """The line to tell if something has taken too long (empty if another rank tells it)."""
        if (silent := self._silent(_SILENT_SECONDS)) is not None:
            return self._claim(self._line(silent, "is silent", status.what))
        behind = min(self._seen, key=lambda other: (self._seen[other].count, other))
        since = max(status.since, self._seen[behind].moved_at)
        too_long = time.monotonic() - since - self.timeout_seconds
        if status.is_patient or too_long < 0:
            return None
        if behind == self._rank and too_long < _GONE_SECONDS:
            # Those that wait can say for what.
            return None
        return self._claim(self._line(behind, "is stuck", status.what))

    def _line(self, other: int, state: str, waited_for: str) -> str:
        seen = self._seen[other]
        how = (
            f"last heard of {time.monotonic() - seen.at:.0f} s ago"
            if state != "is stuck"
            else f"for {self.timeout_seconds:.0f} s"
        )
        return (
            f"{self._status.place}: rank {other} {state} ({how}, in {seen.place}, at {seen.what}); "
            f"rank {self._rank} waited for {waited_for}. Run the same command to go on from the last "
            f"checkpoint."
        )

    def _line_without_store(self, waited_for: str) -> str:
        # The store went with its host, which is the launcher, or the first rank.
        return (
            f"{self._status.place}: rank 0 or the launcher is gone; rank {self._rank} waited for "
            f"{waited_for}. Run the same command to go on from the last checkpoint."
        )

    def _claim(self, line: str) -> str:
        """The line for the first rank that has one to tell, nothing for the others."""
        with contextlib.suppress(RuntimeError), self._lock:
            return line if self._store.add("told", 1) == 1 else ""
        return line
