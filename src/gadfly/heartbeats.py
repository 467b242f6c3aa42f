"""How ranks notice that one of them is gone or stuck, and say which, where, and what it was doing.

Every rank leaves a beat in the store of the launch twice a second, with what it is doing, and reads those of
the others. A rank that is killed or frozen falls silent; one that hangs beats on, but its work stands still.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_BEAT_SECONDS = 0.5
# After a failure, a rank is taken for gone once it has been silent for this long.
_GONE_SECONDS = 3.0
# Without one: a busy machine may keep a thread from beating for a while.
_SILENT_SECONDS = 60.0
# Until the recipe is read, which says how long.
_FIRST_TIMEOUT_SECONDS = 600.0


@dataclass
class Status:
    """What this rank is doing, as the others see it.

    Attributes:
        place: where the work is, as in `gad step 7`.
        what: what is being done there.
        count: how often that has changed. All run the same program: the lowest count is furthest behind.
        is_patient: whether what is done may take as long as it likes.
        since: when it last changed, on this process's clock.
    """

    place: str = "the start"
    what: str = "nothing yet"
    count: int = 0
    is_patient: bool = False
    since: float = field(default_factory=time.monotonic)

    def note(self, what: str, *, is_patient: bool = False) -> None:
        """Say what comes now."""
        self.what, self.is_patient, self.since = what, is_patient, time.monotonic()
        self.count += 1

    @contextlib.contextmanager
    def doing(self, what: str, *, is_patient: bool = False) -> Iterator[None]:
        """Say what is done inside, and afterwards that it is over."""
        self.note(what, is_patient=is_patient)
        yield
        self.note(f"what comes after {what}")

    def beside(self) -> "Status":
        """One for a thread beside the main one; nobody watches it."""
        return Status(self.place)


class Heartbeats:
    """Beats for this rank, and watches over all.

    Args:
        store: a connection that nothing else uses.
        rank: this one.
        size: ranks in all.
        status: what this rank is doing, kept up to date by others.

    Attributes:
        timeout_seconds: how long one thing may take.
    """

    def __init__(self, store: Any, rank: int, size: int, status: Status):
        self._store, self._rank, self._size = store, rank, size
        self._status, self.timeout_seconds = status, _FIRST_TIMEOUT_SECONDS
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._seen = {other: (-1, time.monotonic(), "the start", "nothing yet", 0) for other in range(size)}
        self._meetings = 0
        self._thread: threading.Thread | None = None

    def start(self, on_stuck: Callable[[str], None]) -> None:
        """Beat and watch from now on, in a thread; `on_stuck` gets the line to tell and ends the process."""
        self._thread = threading.Thread(target=self._run, args=(on_stuck,), daemon=True, name="heartbeats")
        self._thread.start()

    def stop(self) -> None:
        """Fall silent."""
        self._is_over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def meet(self, what: str) -> None:
        """Wait for the first rank to come here, however long it takes it, as long as it beats."""
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        if self._rank == 0:
            with self._lock:
                self._store.set(key, what)
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
        if self._rank > 0:
            time.sleep(_BEAT_SECONDS * 2)
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set("confession", f"rank {self._rank}: {failure}")
        return bool(self._claim("tell"))

    def gone(self) -> str | None:
        """Which rank is gone, as the line to tell, after having looked for some seconds; None if none is.

        The line is empty if another rank tells.
        """
        waited_for = self._status.what
        deadline = time.monotonic() + _GONE_SECONDS + 2 * _BEAT_SECONDS
        try:
            while time.monotonic() < deadline:
                with self._lock:
                    if self._store.check(["confession"]):
                        return ""
                    self._look()
                if silent := self._silent(_GONE_SECONDS):
                    return self._claim(self._line(silent[0], "is gone", waited_for))
                time.sleep(_BEAT_SECONDS)
        except RuntimeError:
            # The store went with its host, which is the launcher, or the first rank.
            return (
                f"{self._status.place}: rank 0 or the launcher is gone; rank {self._rank} waited for "
                f"{waited_for}. Run the same command to go on from the last checkpoint."
            )
        return None

    def _run(self, on_stuck: Callable[[str], None]) -> None:
        beat = 0
        while not self._is_over.wait(_BEAT_SECONDS):
            beat += 1
            status = self._status
            try:
                with self._lock:
                    self._store.set(
                        f"beat/{self._rank}", json.dumps([beat, status.place, status.what, status.count])
                    )
                    self._look()
            except RuntimeError:
                # The main thread meets the same failure, and tells it.
                return
            line = self._stuck(status)
            if line is not None:
                self._is_over.set()
                on_stuck(line)
                return

    def _look(self) -> None:
        """Read the beats of all."""
        keys = [f"beat/{other}" for other in range(self._size)]
        everybody = range(self._size)
        there = (
            everybody if self._store.check(keys) else [o for o in everybody if self._store.check([keys[o]])]
        )
        for other, told in zip(there, self._store.multi_get([keys[other] for other in there]), strict=True):
            beat, place, what, count = json.loads(told)
            if beat != self._seen[other][0]:
                self._seen[other] = (beat, time.monotonic(), place, what, count)

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [
            other
            for other, (_, at, *_rest) in self._seen.items()
            if other != self._rank and now - at > seconds
        ]

    def _stuck(self, status: Status) -> str | None:
        """The line to tell if something has taken too long (empty if another rank tells it)."""
        if silent := self._silent(_SILENT_SECONDS):
            return self._claim(self._line(silent[0], "is silent", status.what))
        too_long = time.monotonic() - status.since - self.timeout_seconds
        if status.is_patient or too_long < 0:
            return None
        behind = min(self._seen, key=lambda other: (self._seen[other][4], other))
        if behind == self._rank and too_long < _GONE_SECONDS:
            # Those that wait can say for what.
            return None
        return self._claim(self._line(behind, "is stuck", status.what))

    def _line(self, other: int, state: str, waited_for: str) -> str:
        _, at, place, what, _ = self._seen[other]
        seconds = time.monotonic() - at
        seen = (
            f"last heard of {seconds:.0f} s ago"
            if state != "is stuck"
            else f"for {self.timeout_seconds:.0f} s"
        )
        return (
            f"{self._status.place}: rank {other} {state} ({seen}, in {place}, at {what}); rank {self._rank} "
            f"waited for {waited_for}. Run the same command to go on from the last checkpoint."
        )

    def _claim(self, line: str) -> str:
        """The line for the first rank that has one to tell, nothing for the others."""
        with contextlib.suppress(RuntimeError), self._lock:
            return line if self._store.add("told", 1) == 1 else ""
        return line
