"""Answers that were paid for: each on disk before it counts, found again by its key, never asked twice."""

import contextlib
import datetime
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from types import NoneType

from gadfly.api.chat_answer import ChatAnswer
from gadfly.api.chat_request import Question
from gadfly.api.spending import Usage, is_count
from gadfly.data.marks import mark_of
from gadfly.errors import RunFolderError
from gadfly.run_folder import Record, RunFolder
from gadfly.stored_json import Kind, check_fields

# The system is told to bring rows to the disk itself this often; a killed process loses none in any case.
_SYNC_SECONDS = 1.0

_TEXT: Kind = (str, NoneType)
_FIELDS: dict[str, Kind] = {
    "key": str,
    **dict.fromkeys(("response", "teacher", "mark"), _TEXT),
    **dict.fromkeys(("usage", "charged"), (dict, NoneType)),
}


class PaidAnswers:
    """A JSONL file of answers, one a line, by the `key` of their question.

    Example:
        >>> import tempfile
        >>> answers = PaidAnswers(RunFolder(tempfile.mkdtemp()), "teacher.jsonl")
        >>> with answers.open():
        ...     answers.keep({"key": "a", "response": "4"})
        >>> answers.by_key["a"]["response"]
        '4'
    """

    def __init__(self, folder: RunFolder, name: str):
        """Read what is there.

        Raises:
            RunFolderError: a line is no JSON object, or no answer.
        """
        self.path = folder.path / name
        self._folder, self._name = folder, name
        self.by_key: dict[str, Record] = {row["key"]: row for row in answers_of(folder, name) if "key" in row}
        self._synced_at = 0.0
        self._file: int | None = None
        self._size = 0

    def of(self, questions: Sequence[Question]) -> list[Record]:
        """The answers to these questions that are on disk, in their order."""
        return [self.by_key[key] for question in questions if (key := question.request.key) in self.by_key]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Be ready to keep answers."""
        # Cuts off the half row a kill may have left, and complains where the folder cannot be written.
        self._folder.append_rows(self._name, [])
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._file).st_size
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def keep(self, row: Record) -> None:
        """Put an answer on disk; it counts from then on.

        Raises:
            RunFolderError: the disk is full or the file cannot be written.
        """
        assert self._file is not None, "open() comes first"
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            self._append(self._file, line)
        except OSError as failure:
            raise RunFolderError(
                f"{self.path}: cannot be written: {failure.strerror}; the {len(self.by_key):,} rows before "
                f"are whole"
            ) from None
        self.by_key[row["key"]] = row

    def _append(self, file: int, line: bytes) -> None:
        if os.write(file, line) != len(line):
            # The disk took half a row: without it the file is whole, and smaller rows may still fit.
            os.ftruncate(file, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(line)
        if time.monotonic() - self._synced_at > _SYNC_SECONDS:
            os.fsync(file)
            self._synced_at = time.monotonic()


def answers_of(folder: RunFolder, name: str) -> list[Record]:
    """Every row of a file of answers, line by line; some may be without a key.

    Raises:
        RunFolderError: a line is no JSON object, or no answer.
    """
    rows = folder.rows(name)
    for line, row in enumerate(rows, start=1):
        try:
            check_fields(row, _FIELDS if "key" in row else {})
        except ValueError as wrong:
            raise RunFolderError(f"{folder.path / name}:{line}: {wrong}; mend or delete that line") from None
    return rows


def usage_of(row: Record) -> Usage:
    """Tokens of an answer on disk as the server counted them; none where it did not say."""
    return _usage(row.get("usage"))


def charged_to(row: Record) -> Usage:
    """At most so many tokens were paid for to get an answer on disk, attempts that broke off included."""
    return _usage(row.get("charged") or row.get("usage"))


def _usage(counts: Record | None) -> Usage:
    prompt, completion = ((counts or {}).get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Usage(prompt if is_count(prompt) else 0, completion if is_count(completion) else 0)


def row_of(question: Question, answer: ChatAnswer, author: str) -> Record:
    """A line of the file of answers: the question's own fields, and everything the server said.

    Args:
        question: what was asked.
        answer: what came back.
        author: the field that names the model as the server named it: `teacher` or `judge`.
    """
    request = question.request
    charged = (answer.usage or request.token_bound) + answer.lost
    return {
        "key": request.key,
        **question.about,
        "response": answer.text or answer.refusal or "",
        "finish_reason": answer.finish_reason,
        "mark": mark_of(answer.text, answer.finish_reason, answer.refusal),
        author: answer.model,
        "asked_model": request.model,
        "parameters": dict(request.parameters),
        "sample_index": request.sample_index,
        "usage": asdict(answer.usage) if answer.usage else None,
        "charged": asdict(charged),
        "request_id": answer.request_id,
        "attempts": answer.attempts,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def rejected_row(question: Question, detail: str) -> Record:
    """A line of the file of answers for a question that the server turns down for good."""
    about = {"key": question.request.key, **question.about, "response": "", "mark": "rejected"}
    return {**about, "detail": detail, "sample_index": question.request.sample_index}
