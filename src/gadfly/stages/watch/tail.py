"""A JSONL file that another process writes, read on from where the last look ended."""

import os
from pathlib import Path
from typing import Any

from gadfly.errors import RunFolderError
from gadfly.stored_json import parse_object


class Tail:
    r"""The whole lines of a file, each once; a file that was written anew is read from its start.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> tail = Tail(path)
        >>> tail.read()
        (False, [])
        >>> _ = path.write_text('{"step": 1}\n{"st')
        >>> tail.read()
        (True, [{'step': 1}])
    """

    def __init__(self, path: Path):
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = self._line = 0
        self._rest = b""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file begins anew, so that what was read before is void, and the rows since then.

        Raises:
            RunFolderError: naming a line that is no JSON object.
        """
        try:
            with open(self._path, "rb") as file:
                found = self._begin(file.fileno())
                file.seek(self._offset)
                block = file.read()
        except FileNotFoundError:
            gone = self._identity is not None
            self._identity = None
            return gone, []
        except OSError as failure:
            raise RunFolderError(f"{self._path}: cannot be read: {failure.strerror}") from None
        self._offset += len(block)
        *lines, self._rest = (self._rest + block).split(b"\n")
        return found, [self._row(line) for line in lines]

    def _begin(self, descriptor: int) -> bool:
        state = os.fstat(descriptor)
        identity = state.st_dev, state.st_ino
        if identity == self._identity and state.st_size >= self._offset:
            return False
        self._identity = identity
        self._offset = self._line = 0
        self._rest = b""
        return True

    def _row(self, line: bytes) -> dict[str, Any]:
        self._line += 1
        try:
            return parse_object(line)
        except ValueError as invalid:
            raise RunFolderError(f"{self._path}:{self._line}: {invalid}; mend or delete that line") from None
