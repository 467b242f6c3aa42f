"""Requests to end (SIGINT, SIGTERM), as a thread beside the main one learns of them.

Python handles a signal in the main thread, between two steps of its own. While the main thread is in a call
that does not return, such as the wait for a GPU, nothing of that happens; but the number of the signal is
written to a descriptor at once, and any thread can read it there.
"""

import contextlib
import signal
import socket
import threading
import time

_REQUESTS = (signal.SIGINT, signal.SIGTERM)


class EndRequests:
    """The requests to end that this process has got, as far as its handlers of signals are Python's.

    Only a main thread may listen; elsewhere, as in a worker of Ray, none is heard.
    """

    def __init__(self) -> None:
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._last: float | None = None
        self._before: int | None = None

    def listen(self) -> None:
        """Hear of requests from now on; again after something like asyncio has put its own ear there."""
        if threading.current_thread() is threading.main_thread():
            before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            if self._before is None:
                self._before = before

    def stop(self) -> None:
        """Put back whoever listened before."""
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        self._ear.close()
        self._mouth.close()

    def seconds_since(self) -> float | None:
        """How long ago the last request came; None if there was none."""
        with contextlib.suppress(BlockingIOError):
            while numbers := self._ear.recv(64):
                if any(number in numbers for number in _REQUESTS):
                    self._last = time.monotonic()
        return None if self._last is None else time.monotonic() - self._last
