"""Many questions to one API by its batch endpoint: half the price at large providers, answers within a day.

A batch is noted on disk before it is created, and until its answers are on disk too. So it is submitted once
whenever the process ends, and the same command picks it up.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence

from openai.types import Batch, BatchError

from gadfly.api.asking import (
    Outcome,
    ended,
    has_good_answer,
    run_stoppable,
    spent_before,
)
from gadfly.api.batch_book import BOOK_FILE, BatchBook, OpenBatch, Submission
from gadfly.api.batch_calls import BatchCalls
from gadfly.api.batch_rows import BatchRows
from gadfly.api.chat_answer import ChatAnswer, RequestFailed
from gadfly.api.chat_api import ChatApi
from gadfly.api.chat_request import Question
from gadfly.api.paid_answers import PaidAnswers, rejected_row, row_of
from gadfly.api.spending import spell_dollars
from gadfly.config import TeacherConfig
from gadfly.errors import GadflyError
from gadfly.run_folder import Record, RunFolder

logger = logging.getLogger(__name__)

# The recipe's section and the stage: only the teacher is asked by batches.
_SECTION, _LABEL = "teacher", "collect"
# What the large providers take in one batch.
_MAX_REQUESTS, _MAX_BYTES = 50_000, 100_000_000
# How often a question is submitted that comes back without an answer.
_MAX_SUBMISSIONS = 3
# Rows of status 200 that hold no answer.
_PAID_FOR = frozenset({"no-choice", "not-a-completion"})
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


def ask_by_batch(
    config: TeacherConfig,
    questions: Sequence[Question],
    answers: PaidAnswers,
    folder: RunFolder,
) -> Outcome:
    """Ask every question that has no answer on disk yet by batches, wait for them, and keep the answers.

    Batches that an earlier process submitted are picked up. If they hold other questions only, what has ended
    is kept and the rest is left to a later run. A question that the server turns down for good is kept as an
    answer marked `rejected`.

    Raises:
        ConfigError: `teacher` names no model, or its key is missing.
        ApiError: the API cannot be asked any further, refuses a batch, or left questions unanswered; what is
            submitted goes on at the provider.
        UserError: the budget is spent before every question is answered.
        RunFolderError: an answer or the list of open batches cannot be read or written.
    """
    book = BatchBook(folder)
    if not book.open and all(question.request.key in answers.by_key for question in questions):
        return Outcome()
    api = ChatApi(config, _SECTION, spent_before(config, answers))
    asking = _Asking(api, config.batch_poll_seconds, questions, answers, book)
    run_stoppable(asking.run())
    return ended(asking.outcome, _SECTION, questions, answers, _LABEL)


class _Asking:
    """The questions that wait, the batches that are open, and what came of the others."""

    def __init__(
        self,
        api: ChatApi,
        poll_seconds: float,
        questions: Sequence[Question],
        answers: PaidAnswers,
        book: BatchBook,
    ):
        self.outcome = Outcome()
        self._api, self._poll_seconds = api, poll_seconds
        self._answers, self._book = answers, book
        self._calls, self._rows = BatchCalls(api, _LABEL), BatchRows(api)
        self._wanted = {question.request.key: question for question in questions}
        self._waiting: deque[Submission] = deque()
        self._max_requests, self._one_at_a_time = _MAX_REQUESTS, False
        self._looked: dict[str, Batch] = {}

    async def run(self) -> None:
        try:
            with self._answers.open():
                await self._take_up()
                await self._submit_what_fits()
                while await self._bring_home():
                    await self._submit_what_fits()
            self._log(is_last=True)
        except GadflyError as failure:
            there = sum(batch.batch_id is not None for batch in self._book.open)
            going_on = (
                f"; {there} batch{'es go' if there > 1 else ' goes'} on at the provider" if there else ""
            )
            self.outcome.stopped_by = type(failure)(f"{failure}{going_on}")
        finally:
            await self._api.close()

    async def _take_up(self) -> None:
        """Find the batches that an earlier process created or may have; all else waits to be submitted."""
        for batch in list(self._book.open):
            if batch.batch_id is None and batch.file_id is not None:
                batch.batch_id = await self._calls.find(batch.name, batch.file_id, batch.noted_at)
            if batch.batch_id is None:
                self._book.close(batch)
                continue
            self._book.save()
            self._api.cap_name = batch.cap_name
            for key, submission in batch.submissions.items():
                if key not in self._answers.by_key:
                    self._api.spending.hold(submission.question.request.token_bound)
        there = {key for batch in self._book.open for key in batch.submissions}
        left = self._wanted.keys() - self._answers.by_key.keys() - there
        self._waiting.extend(Submission(question) for key, question in self._wanted.items() if key in left)

    async def _submit_what_fits(self) -> None:
        while self._waiting and not (self._one_at_a_time and self._book.open):
            chosen, content = self._next_batch()
            if not chosen:
                self.outcome.is_budget_spent = not self._book.open
                return
            batch = self._book.note(chosen, self._api.cap_name)
            batch.file_id = await self._calls.upload(batch.name, content)
            self._book.save()
            batch.batch_id = await self._calls.create(batch.name, batch.file_id, batch.noted_at)
            self._book.save()
            logger.info("%s: %s submitted, %d questions", _LABEL, batch.batch_id, len(chosen))

    def _next_batch(self) -> tuple[list[Submission], bytes]:
        """As many as one batch and the budget hold, and the file to upload."""
        chosen: list[Submission] = []
        lines: list[bytes] = []
        num_bytes = 0
        while self._waiting and len(chosen) < self._max_requests:
            request = self._waiting[0].question.request
            line = self._rows.line(request)
            num_bytes += len(line)
            is_full = bool(chosen) and num_bytes > _MAX_BYTES
            if is_full or not self._api.spending.fits(request.token_bound):
                break
            self._api.spending.hold(request.token_bound)
            chosen.append(self._waiting.popleft())
            lines.append(line)
        return chosen, b"".join(lines)

    async def _bring_home(self) -> bool:
        """Look until a batch has ended, and keep its answers; False if none need be waited for."""
        while True:
            for batch in list(self._book.open):
                assert batch.batch_id is not None, "it was created or found"
                looked = self._looked[batch.name] = await self._calls.look(batch.batch_id)
                if looked.status in _ENDED:
                    await self._harvest(batch, looked)
                    return True
            # What other questions hold of the budget is waited for too, where some do not fit into it.
            is_awaited = any(self._waiting or self._is_awaited(batch) for batch in self._book.open)
            if not is_awaited:
                return False
            self._log()
            await asyncio.sleep(self._poll_seconds)

    def _is_awaited(self, batch: OpenBatch) -> bool:
        """Whether it holds any question that is asked for and has no answer."""
        return not self._answers.by_key.keys() >= (batch.submissions.keys() & self._wanted.keys())

    async def _harvest(self, batch: OpenBatch, looked: Batch) -> None:
        failed: dict[str, RequestFailed] = {}
        num_answers = looked.request_counts.completed if looked.request_counts else 0
        outputs = await self._calls.fetch(looked.output_file_id, num_answers)
        errors = await self._calls.fetch(looked.error_file_id, 0)
        for row in (*outputs, *errors):
            submission = batch.submissions.get(key := str(row.get("custom_id")))
            if submission is None or key in self._answers.by_key:
                continue
            try:
                self._keep(submission, self._rows.answer(row, submission.attempts, batch.cap_name))
            except RequestFailed as failure:
                self._api.errors[failure.kind] += 1
                failed[key] = failure
        self._refuse_lost_answers(batch, outputs, failed, num_answers)
        left = {key: item for key, item in batch.submissions.items() if key not in self._answers.by_key}
        for key, submission in left.items():
            bound = submission.question.request.token_bound
            is_paid = key in failed and failed[key].kind in _PAID_FOR
            self._api.spending.release(bound, bound if is_paid else None)
        refusal = self._refusal(batch, looked, failed)
        for key, submission in {} if refusal else left.items():
            self._settle(submission, failed.get(key), looked)
        self._book.close(batch)
        del self._looked[batch.name]
        if refusal:
            raise self._api.fatal(f"{batch.batch_id}: {refusal}")

    def _refuse_lost_answers(
        self, batch: OpenBatch, outputs: list[Record], failed: dict[str, RequestFailed], num_answers: int
    ) -> None:
        """Leave a batch open whose file lacks answers that it says there are: they would be paid for again.

        Raises:
            ApiError: it does.
        """
        absent = batch.submissions.keys() - self._answers.by_key.keys() - failed.keys()
        given = batch.submissions.keys() & {str(row.get("custom_id")) for row in outputs}
        if (num_lost := min(len(absent), num_answers - len(given))) > 0:
            raise self._api.fatal(
                f"{batch.batch_id}: its file lacks {num_lost:,} of {num_answers:,} answers; the same command "
                f"looks again, and without {BOOK_FILE} asks and pays again"
            )

    def _keep(self, submission: Submission, answer: ChatAnswer) -> None:
        question = submission.question
        self._answers.keep(row_of(question, answer, self._api.section))
        self.outcome.answered += 1
        bound = question.request.token_bound
        self._api.spending.release(bound, answer.usage or bound)

    def _refusal(self, batch: OpenBatch, looked: Batch, failed: dict[str, RequestFailed]) -> str | None:
        """Why asking again would not help; None if it may."""
        if _is_over_limit(looked):
            # What the provider lets wait at once is less than this: wait for the others, or halve it.
            is_alone = len(self._book.open) == 1
            if not (is_alone and len(batch.submissions) == 1):
                self._one_at_a_time = True
                self._max_requests = len(batch.submissions) // 2 if is_alone else self._max_requests
                return None
        if looked.status == "failed" and (problem := _problem(looked)):
            line = f", line {problem.line} of it" if problem.line else ""
            return f"the batch is refused: {self._api.safe_line(problem.message or str(problem.code))}{line}"
        rejected = [failure for failure in failed.values() if failure.kind == "rejected"]
        if rejected and not has_good_answer(list(self._wanted.values()), self._answers):
            return f"every question is turned down: {rejected[0].detail}"
        return None

    def _settle(self, submission: Submission, failure: RequestFailed | None, looked: Batch) -> None:
        """Keep what is turned down for good, and submit the rest again unless that was done enough."""
        question = submission.question
        if failure and failure.kind == "rejected":
            self._answers.keep(rejected_row(question, failure.detail))
            self.outcome.rejected += 1
        elif question.request.key not in self._wanted:
            return
        elif _is_over_limit(looked):
            self._waiting.append(submission)
        elif failure and failure.kind == "no-max-tokens":
            self._api.cap_name = "max_completion_tokens"
            self._waiting.append(submission)
        elif submission.attempts < _MAX_SUBMISSIONS:
            self._waiting.append(Submission(question, submission.attempts + 1))
        else:
            self.outcome.failed[failure.kind if failure else f"{looked.status}-without-answer"] += 1
            self.outcome.last_failure = failure.detail if failure else ""

    def _log(self, *, is_last: bool = False) -> None:
        """What is waited for, how far it is, at what cost, with which errors, and for how long so far."""
        looked = list(self._looked.values())
        in_batches = sum(batch.request_counts.completed for batch in looked if batch.request_counts)
        done = sum(key in self._answers.by_key for key in self._wanted) + in_batches
        parts = [f"{_LABEL} {min(done, len(self._wanted)):,}/{len(self._wanted):,}"]
        if len(looked) == 1:
            parts.append(f"waiting for {looked[0].id} ({looked[0].status})")
        elif looked:
            statuses = Counter(batch.status for batch in looked).most_common()
            counts = ", ".join(f"{count} {status}" for status, count in statuses)
            parts.append(f"waiting for {len(looked)} batches ({counts})")
        if (dollars := self._api.spending.dollars) is not None:
            parts.append(spell_dollars(dollars))
        if errors := self._api.errors.most_common():
            parts.append("errors: " + ", ".join(f"{count} {kind}" for kind, count in errors))
        if self._book.open:
            minutes = (time.time() - min(batch.noted_at for batch in self._book.open)) / 60
            parts.append(f"for {int(minutes // 60)}:{int(minutes % 60):02d} h")
        logger.info("  ".join(parts), extra={"live": True, "last": is_last})


def _problem(batch: Batch) -> BatchError | None:
    problems = batch.errors.data if batch.errors else None
    return problems[0] if problems else None


def _is_over_limit(batch: Batch) -> bool:
    problem = _problem(batch)
    return batch.status == "failed" and problem is not None and problem.code == "token_limit_exceeded"
