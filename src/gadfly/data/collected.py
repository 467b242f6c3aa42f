"""The teacher's answers in a run folder: which questions a recipe puts, and the data set they make."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from gadfly.api.chat_request import ChatRequest, Question, parameters_of
from gadfly.api.paid_answers import answers_of
from gadfly.config import Recipe
from gadfly.data.dataset import Dataset, gather, load_rows
from gadfly.errors import DataError
from gadfly.records import Message, Row
from gadfly.run_folder import RunFolder

TEACHER_FILE = "teacher.jsonl"


def questions(recipe: Recipe, prompts: Sequence[Row]) -> list[Question]:
    """What a recipe asks the teacher: every prompt once, then every prompt again, up to the samples wanted.

    So a budget that ends the asking early has bought the first answers to all prompts.
    """
    config = recipe.teacher
    assert config.model is not None, "the caller has checked"
    parameters = parameters_of(config)
    return [
        Question(
            ChatRequest(config.model, _asked(row.messages, config.system_prompt), parameters, sample_index),
            {"id": row.id, "messages": [asdict(message) for message in row.messages]},
        )
        for sample_index in range(config.samples_per_prompt)
        for row in prompts
    ]


def collected(recipe: Recipe, folder: RunFolder) -> Dataset | None:
    """The answers on disk in the order of the prompts, whatever order they came in; None if there are none.

    Where the recipe names prompts and a teacher, only answers to its own questions count: those to earlier
    settings stay in the file, but are not used.

    Raises:
        DataError: no answer can be used.
    """
    path = folder.path / TEACHER_FILE
    rows = answers_of(folder, TEACHER_FILE)
    if not rows:
        return None
    numbered = [(str(path), line, row) for line, row in enumerate(rows, start=1)]
    if recipe.data.prompts is not None and recipe.teacher.model is not None:
        by_key = {row["key"]: (source, line, row) for source, line, row in numbered if "key" in row}
        numbered = []
        for question in questions(recipe, load_rows(recipe.data.prompts, needs_response=False).rows):
            if found := by_key.get(question.request.key):
                source, line, row = found
                # An answer may have been asked for when its prompt had another id.
                numbered.append((source, line, {**row, **question.about}))
        if not numbered:
            raise DataError(
                f"{path}: none of its {len(rows):,} answers is to a question of this recipe; put teacher.* "
                f"and data.prompts back to what they were asked with, or run `gadfly collect RECIPE`"
            )
    return gather([str(path)], numbered, needs_response=True, train_on=recipe.teacher.train_on)


def _asked(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """The prompt as the teacher gets it: chat templates take one system turn, so two become one."""
    if system_prompt is None:
        return tuple(messages)
    if messages[0].role == "system":
        joined = replace(messages[0], content=f"{system_prompt}\n\n{messages[0].content}")
        return (joined, *messages[1:])
    return (Message("system", system_prompt), *messages)
