"""Many questions to one API: so many in flight at once, each answer kept as it comes, ended in good order."""

import asyncio
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

from gadfly.api.chat_answer import RequestFailed
from gadfly.api.chat_api import ChatApi, NotAsked
from gadfly.api.chat_request import Question
from gadfly.api.paid_answers import PaidAnswers, charged_to, rejected_row, row_of
from gadfly.api.spending import BudgetSpent, Spending, spell_dollars
from gadfly.config import ApiConfig
from gadfly.errors import ApiError, GadflyError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# So many failures, or questions turned down, before any answer are the server's doing.
_FIRST_FAILURES = 3
# Later, as many as are answered may fail, and always a few.
_FEW_FAILURES = 20
# While one answer is waited for, each worker may meet some questions that are turned down at once.
_TURNED_DOWN_PER_WORKER = 2
_PROGRESS_SECONDS = 1.0


@dataclass
class Outcome:
    """How far the asking got."""

    answered: int = 0
    """Questions answered now; what was on disk before does not count."""
    rejected: int = 0
    """Questions the server turns down for good: kept, so that they are not asked again."""
    failed: Counter[str] = field(default_factory=Counter)
    """Questions without an answer, by kind: the next run asks them again."""
    last_failure: str = ""
    """What the server said to the last of them."""
    is_budget_spent: bool = False
    stopped_by: GadflyError | None = None
    """Why nothing more could be asked."""


def ask(
    config: ApiConfig, section: str, questions: Sequence[Question], answers: PaidAnswers, label: str
) -> Outcome:
    """Ask every question that has no answer on disk yet, and keep each answer as it comes.

    A question that the server turns down for good is kept as an answer marked `rejected`, so that it is
    not asked again.

    Raises:
        ConfigError: the section names no model, or its key is missing.
        ApiError: the API cannot be asked any further, or left questions unanswered.
        UserError: the budget is spent before every question is answered.
        RunFolderError: an answer cannot be written.
    """
    todo = {key: question for question in questions if (key := question.request.key) not in answers.by_key}
    if not todo:
        return Outcome()
    api = ChatApi(config, section, spent_before(config, answers))
    total = len({question.request.key for question in questions})
    outcome = run_stoppable(
        _Asking(api, answers, has_good_answer(questions, answers)).ask(list(todo.values()), label, total)
    )
    return ended(outcome, section, questions, answers, label)


def ended(
    outcome: Outcome, section: str, questions: Sequence[Question], answers: PaidAnswers, label: str
) -> Outcome:
    """The outcome if every question has its answer on disk; else the error that says why not.

    Raises:
        ApiError: the API could not be asked any further, or left questions unanswered.
        UserError: the budget is spent.
        RunFolderError: an answer could not be written.
    """
    keys = {question.request.key for question in questions}
    total, left = len(keys), sum(key not in answers.by_key for key in keys)
    kept = f"{total - left:,} of {total:,} answers are kept in {answers.path}"
    if outcome.stopped_by:
        again = "Put it right and run the same command to go on."
        raise type(outcome.stopped_by)(f"{outcome.stopped_by}; {kept}. {again}")
    if outcome.is_budget_spent:
        raise UserError(f"{section}.budget is spent; {kept}. Raise it and run the same command to go on.")
    if left:
        kinds = ", ".join(f"{count} {kind}" for kind, count in outcome.failed.most_common())
        last = f"; the last: {outcome.last_failure}" if outcome.last_failure else ""
        raise ApiError(
            f"{label}: {left:,} questions failed ({kinds}{last}); {kept}. Run the same command to ask again."
        )
    return outcome


def run_stoppable(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, but SIGINT and SIGTERM cancel the work; their handlers are called once all is closed.

    A handler that raised in the middle of a step could be ignored, or leave connections open.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            came.append(number)
            task.cancel()

        for number, handler in handlers.items():
            if callable(handler):
                asyncio.get_running_loop().add_signal_handler(number, stop, number)
        return await work

    try:
        return asyncio.run(main())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for which in came:
            signal.raise_signal(which)


def spent_before(config: ApiConfig, answers: PaidAnswers) -> Spending:
    """What the answers on disk have cost."""
    spending = Spending(config)
    for row in answers.by_key.values():
        spending.add(charged_to(row))
        spending.requests += int(row.get("attempts", 1))
    return spending


def has_good_answer(questions: Sequence[Question], answers: PaidAnswers) -> bool:
    """Whether the server has answered any of these questions before, so that it takes their parameters."""
    found = (answers.by_key.get(question.request.key) for question in questions)
    return any(row is not None and row.get("mark") != "rejected" for row in found)


class _Asking:
    """One asking of many questions: who works on it, and what becomes of each."""

    def __init__(self, api: ChatApi, answers: PaidAnswers, has_good_answer: bool):
        self._api, self._answers = api, answers
        self._has_good_answer = has_good_answer
        self._outcome = Outcome()
        # Turned down at that moment, but nothing has shown yet that others are not.
        self._turned_down: list[tuple[int, Question, RequestFailed]] = []
        self._moments = count()

    async def ask(self, todo: Sequence[Question], label: str, num_questions: int) -> Outcome:
        waiting = iter(todo)
        progress = _Progress(label, self._api, self._outcome, num_questions - len(todo), num_questions)
        with self._answers.open():
            shown = asyncio.create_task(progress.show())
            num_workers = min(self._api.config.concurrency, len(todo))
            try:
                await asyncio.gather(*(self._work(waiting) for _ in range(num_workers)))
            finally:
                shown.cancel()
                await self._api.close()
            if self._has_good_answer and self._outcome.stopped_by is None:
                self._keep_turned_down(next(self._moments))
        for _, _, failure in self._turned_down:
            self._note_failure(failure)
        progress.log(is_last=True)
        return self._outcome

    async def _work(self, waiting: Iterator[Question]) -> None:
        # What is in flight when the asking stops is still waited for, since it may have been paid for.
        for question in waiting:
            if self._api.is_stopped:
                return
            try:
                await self._ask_one(question)
            except NotAsked:
                return
            except GadflyError as failure:
                self._stop(failure)

    async def _ask_one(self, question: Question) -> None:
        began = next(self._moments)
        try:
            answer = await self._api.answer(question.request)
        except BudgetSpent:
            # Another question may be shorter, and fit.
            self._outcome.is_budget_spent = True
        except RequestFailed as failure:
            self._note(question, failure)
        else:
            self._answers.keep(row_of(question, answer, self._api.section))
            self._outcome.answered += 1
            self._has_good_answer = True
            self._keep_turned_down(began)

    def _note(self, question: Question, failure: RequestFailed) -> None:
        if failure.kind != "rejected":
            self._note_failure(failure)
            return
        self._turned_down.append((next(self._moments), question, failure))
        bearable = _FEW_FAILURES + _TURNED_DOWN_PER_WORKER * self._api.config.concurrency
        if len(self._turned_down) >= (bearable if self._has_good_answer else _FIRST_FAILURES):
            since = "since its last answer it turns down everything, " if self._has_good_answer else ""
            self._stop(self._api.fatal(f"{since}{failure}"))

    def _keep_turned_down(self, before: int) -> None:
        """Others asked later are answered: what was turned down by then was so for what it says."""
        while self._turned_down and self._turned_down[0][0] < before:
            _, question, failure = self._turned_down[0]
            self._answers.keep(rejected_row(question, failure.detail))
            del self._turned_down[0]
            self._outcome.rejected += 1

    def _note_failure(self, failure: RequestFailed) -> None:
        """Count a question without an answer, and stop where too few are answered."""
        outcome = self._outcome
        outcome.failed[failure.kind] += 1
        outcome.last_failure = failure.detail
        bearable = max(_FEW_FAILURES, outcome.answered) if outcome.answered else _FIRST_FAILURES - 1
        if outcome.failed.total() > bearable:
            self._stop(self._api.fatal(str(failure)))

    def _stop(self, failure: GadflyError) -> None:
        self._outcome.stopped_by = self._outcome.stopped_by or failure
        self._api.stop()


class _Progress:
    """A live line a second: how far, how fast, at what cost, with which errors, how long still."""

    def __init__(self, label: str, api: ChatApi, outcome: Outcome, before: int, total: int):
        self._label, self._api, self._outcome = label, api, outcome
        self._before, self._total = before, total
        self._started = time.monotonic()

    async def show(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            self.log(is_last=False)

    def log(self, *, is_last: bool) -> None:
        done = self._outcome.answered + self._outcome.rejected
        minutes = max(1e-9, time.monotonic() - self._started) / 60
        parts = [f"{self._label} {self._before + done:,}/{self._total:,}", f"{done / minutes:,.0f}/min"]
        if (dollars := self._api.spending.dollars) is not None:
            limit = self._api.config.budget.dollars
            parts.append(spell_dollars(dollars) + ("" if limit is None else f" of {spell_dollars(limit)}"))
        if errors := self._api.errors.most_common():
            parts.append("errors: " + ", ".join(f"{count} {kind}" for kind, count in errors))
        if done and not is_last:
            left = round((self._total - self._before - done) * minutes * 60 / done)
            parts.append(f"{left // 60}:{left % 60:02d} left")
        logger.info("  ".join(parts), extra={"live": True, "last": is_last})
