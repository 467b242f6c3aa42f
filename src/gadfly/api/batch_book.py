"""Which questions are in a batch at the provider: on disk before it is created, until its answers are."""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any

from gadfly.api.chat_request import ChatRequest, Question
from gadfly.errors import RunFolderError, UserError
from gadfly.records import Message
from gadfly.run_folder import Record, RunFolder, write_text
from gadfly.stored_json import Kind, check_fields

_FOLDER = "collect"
BOOK_FILE = f"{_FOLDER}/batches.json"

_NAME = re.compile(r"[0-9a-f]+(-[0-9a-f]+)?")
_BATCH: dict[str, Kind] = {
    "questions": int,
    **dict.fromkeys(("name", "cap_name"), str),
    "noted_at": float,
    **dict.fromkeys(("file_id", "batch_id"), (str, NoneType)),
}
_SUBMISSION: dict[str, Kind] = {
    **dict.fromkeys(("about", "parameters"), dict),
    "model": str,
    "messages": list,
    **dict.fromkeys(("sample_index", "attempts"), int),
}


@dataclass(frozen=True)
class Submission:
    """A question, and how often it has been submitted, this time included."""

    question: Question
    attempts: int = 1


@dataclass
class OpenBatch:
    """A batch that is to be created, or whose answers are not all on disk yet."""

    name: str
    """Of this very submission: the start of a hash of its questions, and something random. The batch carries
    it at the provider, so one whose creation was not heard of can be found there."""
    cap_name: str
    """What the requests call the cap of an answer."""
    noted_at: float
    """Seconds since 1970, before anything was sent."""
    file_id: str | None = None
    """The uploaded requests. Until this is on disk no batch can have been created of them."""
    batch_id: str | None = None
    """Unknown until the provider has said it."""
    submissions: dict[str, Submission] = field(default_factory=dict)
    """By the key of the question."""

    @property
    def questions_file(self) -> str:
        """Where its questions are, in the run folder."""
        return f"{_FOLDER}/batch-{self.name}.jsonl"


class BatchBook:
    """The open batches of a run folder.

    Example:
        >>> import tempfile
        >>> folder = RunFolder(tempfile.mkdtemp())
        >>> question = Question(ChatRequest("gpt-4o", (Message("user", "2+2?"),)))
        >>> batch = BatchBook(folder).note([Submission(question)], cap_name="max_tokens")
        >>> list(BatchBook(folder).open[0].submissions) == [question.request.key]
        True
    """

    def __init__(self, folder: RunFolder):
        """Read what is there, and remove questions that no batch was noted for.

        Raises:
            RunFolderError: the book or the questions of a batch are not as they were written.
        """
        self._folder = folder
        noted = folder.read_json(BOOK_FILE).get("batches", [])
        if not isinstance(noted, list):
            raise self._spoilt("batches is no list")
        self.open = [self._read(batch) for batch in noted]
        noted_files = {folder.path / batch.questions_file for batch in self.open}
        for path in (folder.path / _FOLDER).glob("batch-*.jsonl"):
            if path not in noted_files:
                path.unlink(missing_ok=True)

    def note(self, submissions: Sequence[Submission], cap_name: str) -> OpenBatch:
        """Put on disk that these questions are about to be submitted as one batch.

        Raises:
            RunFolderError: that cannot be written.
        """
        lines = "".join(json.dumps(_row(submission)) + "\n" for submission in submissions)
        content = hashlib.sha256(lines.encode()).hexdigest()
        by_key = {submission.question.request.key: submission for submission in submissions}
        name = f"{content[:16]}-{secrets.token_hex(4)}"
        batch = OpenBatch(name, cap_name, time.time(), submissions=by_key)
        # JSON in ASCII, since a prompt may hold what UTF-8 cannot.
        write_text(self._folder.path / batch.questions_file, lines)
        self.open.append(batch)
        self.save()
        return batch

    def save(self) -> None:
        """Put on disk what has become known of the open batches.

        Raises:
            RunFolderError: it cannot be written.
        """
        noted = [
            {
                "name": batch.name,
                "questions": len(batch.submissions),
                "cap_name": batch.cap_name,
                "noted_at": batch.noted_at,
                "file_id": batch.file_id,
                "batch_id": batch.batch_id,
            }
            for batch in self.open
        ]
        self._folder.write_json(BOOK_FILE, {"batches": noted})

    def close(self, batch: OpenBatch) -> None:
        """Forget a batch: its answers are on disk, or it will have none."""
        self.open.remove(batch)
        self.save()
        (self._folder.path / batch.questions_file).unlink(missing_ok=True)

    def _read(self, noted: Any) -> OpenBatch:
        try:
            check_fields(noted, _BATCH)
            # It becomes the name of a file, which is removed in the end.
            if not _NAME.fullmatch(noted["name"]):
                raise ValueError(f"name = {noted['name']!r:.80}: not one of ours")
            num_questions = noted.pop("questions")
            batch = OpenBatch(**noted)
            submissions = [_submission(row) for row in self._folder.rows(batch.questions_file)]
        except (KeyError, TypeError, ValueError) as wrong:
            raise self._spoilt(f"not as it was written ({wrong})") from None
        batch.submissions = {submission.question.request.key: submission for submission in submissions}
        if len(batch.submissions) != num_questions:
            found = f"{len(batch.submissions):,} of {num_questions:,} questions"
            raise self._spoilt(f"{found} are in {batch.questions_file}")
        return batch

    def _spoilt(self, what: str) -> RunFolderError:
        path = self._folder.path / BOOK_FILE
        return RunFolderError(
            f"{path}: {what}; mend it, or delete it to pay again for what is at the provider"
        )


def batches_at_provider(folder: RunFolder) -> list[OpenBatch]:
    """The open batches that are there, or may be.

    Raises:
        RunFolderError: the book is not as it was written.
    """
    # Without an uploaded file no batch can be there.
    return [batch for batch in BatchBook(folder).open if batch.file_id]


def refuse_open_batches(folder: RunFolder) -> None:
    """See to it that nothing is asked for that a batch at the provider will answer.

    Raises:
        UserError: there is such a batch.
        RunFolderError: the book is not as it was written.
    """
    if there := batches_at_provider(folder):
        num_questions = sum(len(batch.submissions) for batch in there)
        raise UserError(
            f"{folder.path / BOOK_FILE}: {num_questions:,} questions are in a batch at the provider; set "
            f"teacher.batch = true and run `gadfly collect` to get their answers, or delete that file to pay "
            f"for them again"
        )


def _row(submission: Submission) -> Record:
    request = submission.question.request
    return {
        "about": submission.question.about,
        "model": request.model,
        "messages": [asdict(message) for message in request.messages],
        "parameters": dict(request.parameters),
        "sample_index": request.sample_index,
        "attempts": submission.attempts,
    }


def _submission(row: Record) -> Submission:
    check_fields(row, _SUBMISSION)
    for turn in row["messages"]:
        check_fields(turn, {"role": str, "content": str}, "messages.")
    messages = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
    request = ChatRequest(row["model"], messages, row["parameters"], row["sample_index"])
    return Submission(Question(request, row["about"]), row["attempts"])
