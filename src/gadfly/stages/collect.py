"""The teacher's answers to the prompts, through its API: paid for once, kept in `teacher.jsonl`."""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Sequence

from gadfly.api.asking import ask, spent_before
from gadfly.api.batch_book import batches_at_provider, refuse_open_batches
from gadfly.api.batches import ask_by_batch
from gadfly.api.chat_request import Question
from gadfly.api.paid_answers import PaidAnswers, usage_of
from gadfly.api.spending import Spending, Usage, spell_dollars
from gadfly.data.collected import TEACHER_FILE, questions
from gadfly.data.dataset import Dataset, load_rows
from gadfly.errors import ConfigError, RunFolderError
from gadfly.run_folder import Record
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)

TRIAL_PROMPTS = 20
_SHOWN = 3
# What a name may have more and still be the same model: gpt-4o-2024-08-06, qwen2.5:latest.
_VERSION = re.compile(r"([-@:._](latest|preview|v?\d[\d.-]*))*")


def collect(run: Run) -> None:
    """Ask the teacher everything that is not on disk yet.

    Raises:
        ConfigError: the recipe names no prompts or no teacher.
        ApiError: the teacher cannot be asked any further, or did not answer every prompt.
        UserError: the budget is spent before every prompt is answered.
    """
    asked = questions(run.recipe, _prompts(run).rows)
    _ask(run, asked, by_batch=run.recipe.teacher.batch, among=asked)


def trial(run: Run) -> str:
    """Ask the first prompts only, and tell what came back and what all would cost.

    They are asked one by one, since a batch may take a day.

    Raises:
        ConfigError: the recipe names no prompts or no teacher.
        ApiError: the teacher cannot be asked.
    """
    asked = questions(run.recipe, _prompts(run).rows)
    rows = _ask(run, asked[:TRIAL_PROMPTS], by_batch=False, among=asked)
    shown = "\n\n".join(_shown(row) for row in rows[:_SHOWN])
    note = "\nthe trial was asked one by one, at the price of single requests" * run.recipe.teacher.batch
    return f"{shown}\n\n{_estimate(run, asked)}{note}"


def estimate(run: Run) -> str:
    """What is asked, what is on disk, and what the rest may cost, without a request.

    Tokens are about four characters each; the length of an answer is that of those on disk, or else unknown
    up to the cap.

    Raises:
        ConfigError: the recipe names no prompts or no teacher.
    """
    return _estimate(run, questions(run.recipe, _prompts(run).rows))


def _estimate(run: Run, asked: Sequence[Question]) -> str:
    config = run.recipe.teacher
    answers = PaidAnswers(run.folder, TEACHER_FILE)
    in_batch = {key for batch in batches_at_provider(run.folder) for key in batch.submissions}
    unanswered = [question for question in asked if question.request.key not in answers.by_key]
    left = [question for question in unanswered if question.request.key not in in_batch]
    price = Spending(config)
    prompt = sum(len(message.content) for question in left for message in question.request.messages) // 4
    done = f"{len(asked) - len(unanswered):,} answered already"
    if num_open := len(unanswered) - len(left):
        done += f", {num_open:,} in a batch at the provider"
    lines = [f"{len(asked):,} questions to {config.model}, {done}"]
    rows = answers.of(asked)
    if usages := [usage for row in rows if (usage := usage_of(row)).completion_tokens]:
        length = sum(usage.completion_tokens for usage in usages) / len(usages)
        likely = Usage(prompt, round(length * len(left)))
        lines.append(_bill("if answers stay as long as so far", price, likely))
    if config.max_response_tokens is not None:
        largest = Usage(prompt, config.max_response_tokens * len(left))
        lines.append(_bill("if every answer reaches the cap", price, largest))
    elif not usages:
        lines.append(f"to ask: about {prompt:,} tokens of prompts; no cap (teacher.max_response_tokens)")
    return "\n".join(lines)


def _bill(how: str, price: Spending, usage: Usage) -> str:
    dollars = price.cost(usage)
    cost = "no price given (teacher.price)" if dollars is None else spell_dollars(dollars)
    return (
        f"to ask, {how}: about {usage.prompt_tokens:,} tokens of prompts, "
        f"{usage.completion_tokens:,} of answers: {cost}"
    )


def _prompts(run: Run) -> Dataset:
    config = run.recipe
    if config.data.prompts is None:
        raise ConfigError("data.prompts: must be given to collect: a file with prompts for the teacher")
    if config.teacher.model is None:
        raise ConfigError(
            f"teacher.model: must be given to collect: the model's name at {config.teacher.base_url}"
        )
    prompts = load_rows(config.data.prompts, needs_response=False)
    run.bad_as_read["prompts"] = prompts.bad
    run.note_bad_rows("prompts", (), len(prompts.rows))
    return prompts


def _ask(run: Run, asked: Sequence[Question], *, by_batch: bool, among: Sequence[Question]) -> list[Record]:
    """Ask, note in the summary what is on disk of all questions whatever happens, and return the answers."""
    answers = PaidAnswers(run.folder, TEACHER_FILE)
    had = len(answers.by_key)
    try:
        if by_batch:
            ask_by_batch(run.recipe.teacher, asked, answers, run.folder)
        else:
            refuse_open_batches(run.folder)
            ask(run.recipe.teacher, "teacher", asked, answers, "collect")
    except BaseException:
        # What ended the asking is told, not that the summary cannot be written either.
        with contextlib.suppress(RunFolderError):
            _note(run, among, answers)
        raise
    _note(run, among, answers)
    if len(answers.by_key) == had:
        logger.info("collect: done already, %d answers", had)
    return answers.of(asked)


def _note(run: Run, asked: Sequence[Question], answers: PaidAnswers) -> None:
    rows = answers.of(asked)
    marks = Counter(row["mark"] for row in rows if row.get("mark"))
    _tell(run, rows, marks)
    spending = spent_before(run.recipe.teacher, answers)
    run.folder.replace_in_summary("collect", _facts(rows, marks, spending))


def _facts(rows: Sequence[Record], marks: Counter[str], spending: Spending) -> Record:
    return {
        "answers": len(rows),
        "marked": dict(marks),
        "teachers": dict(Counter(row["teacher"] for row in rows if "teacher" in row)),
        "requests": spending.requests,
        "prompt_tokens": spending.used.prompt_tokens,
        "completion_tokens": spending.used.completion_tokens,
        "dollars": spending.dollars,
    }


def _tell(run: Run, rows: Sequence[Record], marks: Counter[str]) -> None:
    if marks:
        counts = ", ".join(f"{count} {mark}" for mark, count in marks.most_common())
        logger.warning(
            "collect: %d of %d answers are marked: %s (teacher.train_on)", marks.total(), len(rows), counts
        )
    model = run.recipe.teacher.model or ""
    strangers = {row["teacher"] for row in rows if not _same_model(model, row.get("teacher") or "")}
    if strangers:
        logger.warning("collect: %s was asked, %s answered", model, ", ".join(sorted(strangers)))


def _same_model(asked: str, answered: str) -> bool:
    """Whether one name is the other with a version or a publisher added, or the server says none."""
    names = (name.casefold().rsplit("/", 1)[-1] for name in (asked, answered))
    shorter, longer = sorted(names, key=len)
    version = longer.removeprefix(shorter)
    return not answered or (longer.startswith(shorter) and bool(_VERSION.fullmatch(version)))


def _shown(row: Record) -> str:
    prompt = row["messages"][-1]["content"]
    length = (row.get("usage") or {}).get("completion_tokens", "?")
    mark = f", {row['mark']}" if row.get("mark") else ""
    return f"> {prompt[:500]}\n{row['response'][:1000]}\n[{row.get('teacher')}, {length} tokens{mark}]"
