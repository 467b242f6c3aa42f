"""Files that another machine wrote: on a network file system they may be seen late, or not yet whole."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from gadfly.errors import RunFolderError

# Clients of NFS believe what they have seen for up to a minute.
_WAIT_SECONDS = 90.0
_POLL_SECONDS = 0.2


def sizes(folder: Path, files: Iterable[Path]) -> dict[str, int]:
    """Bytes of files by their names under a folder, as the machine that wrote them sees them."""
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def await_files(folder: Path, expected: Mapping[str, int]) -> None:
    """Wait until every file is there with all its bytes.

    Args:
        folder: where this machine sees them.
        expected: what `sizes` gave on the machines that wrote them.

    Raises:
        RunFolderError: naming the first file that is still not whole after a while.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    for name, size in expected.items():
        while (seen := _size(folder / name)) != size:
            if time.monotonic() > deadline:
                raise RunFolderError(
                    f"{folder / name}: {seen:,} of the {size:,} bytes that another process wrote are seen "
                    f"here after {_WAIT_SECONDS:.0f} s; put the run folder where all machines see the same"
                )
            time.sleep(_POLL_SECONDS)


def _size(file: Path) -> int:
    try:
        # What opens a file is told its size by the server, where a mere look may be told an old one.
        with open(file, "rb") as opened:
            return opened.seek(0, 2)
    except FileNotFoundError:
        return 0
