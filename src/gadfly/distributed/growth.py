"""Long writes as progress: a process whose files grow is not stuck, however slow the disk is."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from gadfly.distributed.processes import Processes

_LOOK_SECONDS = 1.0


@contextlib.contextmanager
def growth_as_progress(folder: Path, processes: Processes) -> Iterator[None]:
    """While inside, tell the other processes whenever the files of a folder have grown."""
    if processes.size == 1:
        yield
        return
    is_over = threading.Event()

    def watch() -> None:
        before = 0
        while not is_over.wait(_LOOK_SECONDS):
            if (now := _size(folder)) != before:
                before = now
                processes.progress(f"writing the checkpoint: {now / 1e6:.0f} MB")

    watcher = threading.Thread(target=watch, daemon=True, name="growth")
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _size(folder: Path) -> int:
    total = 0
    # What is renamed or deleted meanwhile, the folder itself included, is counted next time.
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total
