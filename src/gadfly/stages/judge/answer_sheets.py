"""What there is to judge: every model's answers to a test set, the teacher's among them."""

from collections.abc import Sequence
from dataclasses import dataclass

from gadfly.data.dataset import load_rows
from gadfly.errors import UserError
from gadfly.records import Row, generations_file
from gadfly.stages.run import Run

TEACHER = "teacher"
"""The teacher's name among the models."""


@dataclass(frozen=True)
class AnswerSheet:
    """The prompts of a test set, and the text each model answered to each."""

    name: str
    """As in `generations/NAME.jsonl`."""
    rows: tuple[Row, ...]
    answers: dict[str, dict[str, str]]
    """By model, then by the prompt's id."""
    judged: tuple[str, ...]
    """The models to judge; the others are there to be held beside them."""

    def answered_by(self, *models: str) -> list[Row]:
        """The prompts that all of these models answered."""
        return [row for row in self.rows if all(row.id in self.answers[model] for model in models)]


def answer_sheets(run: Run) -> list[AnswerSheet]:
    """A sheet for every test set and temperature that was generated; `judge.models` says whom to judge.

    Raises:
        UserError: nothing was generated, or a model has no answers.
    """
    sheets = []
    for name, files in run.recipe.data.test.items():
        rows = load_rows(files, needs_response=False).rows
        for temperature in run.recipe.generate.temperatures:
            file = generations_file(name, temperature)
            if sheet := _sheet(run, file, rows):
                sheets.append(sheet)
    if not sheets:
        raise UserError(f"judge: no generations under {run.folder.path}; run `gadfly generate RECIPE` first")
    return sheets


def _sheet(run: Run, file: str, rows: Sequence[Row]) -> AnswerSheet | None:
    answers: dict[str, dict[str, str]] = {}
    prompts = {row.id: row.prompt for row in rows}
    for generation in run.folder.rows(f"generations/{file}.jsonl"):
        # A test set that was edited may ask something else under the same id.
        if generation["prompt"] == prompts.get(generation["id"]):
            answers.setdefault(generation["model"], {})[generation["id"]] = generation["response"]
    if not answers:
        return None
    if taught := {row.id: row.responses[0].text for row in rows if row.responses}:
        answers[TEACHER] = taught
    wanted = run.recipe.judge.models
    if absent := [model for model in wanted if model not in answers]:
        raise UserError(
            f"judge.models: {', '.join(absent)} did not answer {file!r}; there are {', '.join(answers)}"
        )
    return AnswerSheet(file, tuple(rows), answers, tuple(wanted or answers))
