"""The judge stage: what is to be said of the generations by somebody other than the discriminator.

Three methods, each in a file of its own: `score` and `pairwise` ask a judge model through its API, `tell`
needs none. What was asked is in `verdicts/answers.jsonl`, what was read from it in `verdicts/SET.jsonl`, the
figures are in `summary.json`.
"""

import logging
from collections.abc import Mapping

from gadfly.run_folder import Record
from gadfly.stages.judge.answer_sheets import AnswerSheet, answer_sheets
from gadfly.stages.judge.families import shared_family
from gadfly.stages.judge.pairwise import pairwise
from gadfly.stages.judge.score import score
from gadfly.stages.judge.told import told
from gadfly.stages.run import Run
from gadfly.statistics import Figure

logger = logging.getLogger(__name__)


def judge(run: Run) -> None:
    """Judge the generations of every test set by the methods of the recipe.

    Every answer of a judge is paid for once; what is there already is read again.

    Raises:
        ConfigError: a method needs a judge and none is named.
        UserError: nothing was generated yet, or a model has no answers.
        ApiError: the judge cannot be asked, or left questions unanswered.
    """
    config = run.recipe.judge
    methods = [config.method] if isinstance(config.method, str) else config.method
    asks_api = bool({"score", "pairwise"} & set(methods))
    for sheet in answer_sheets(run):
        noted: Record = {"methods": methods}
        verdicts: list[Record] = []
        if asks_api:
            noted |= {"judge": config.model, "shares_family": _shared(run, sheet)}
        if "score" in methods:
            figures, rows, unparsable = score(run, sheet)
            _note(run, sheet, figures)
            verdicts += rows
            noted |= {"both_orders": config.both_orders, "unparsable": unparsable}
        if "pairwise" in methods:
            results, rows = pairwise(run, sheet)
            run.folder.replace_in_summary("pairwise", {sheet.name: results})
            verdicts += rows
        if "tell" in methods:
            _note(run, sheet, told(run, sheet))
        if asks_api:
            run.folder.write_rows(f"verdicts/{sheet.name}.jsonl", verdicts)
        run.folder.replace_in_summary("judge", {sheet.name: noted})
        logger.info("judge %s: done, %s", sheet.name, ", ".join(methods))


def _note(run: Run, sheet: AnswerSheet, figures: Mapping[str, Mapping[str, Figure]]) -> None:
    evaluation = {
        model: {sheet.name: {name: figure.as_record() for name, figure in named.items()}}
        for model, named in figures.items()
    }
    run.folder.update_summary("evaluation", evaluation)


def _shared(run: Run, sheet: AnswerSheet) -> Record:
    """Who is of the judge's family: such a judge favours its like, which the report must say."""
    teachers = {response.teacher for row in sheet.rows for response in row.responses if response.teacher}
    others = {f"teacher ({name})": name for name in sorted(teachers)}
    shared = shared_family(run.recipe.judge.model or "", {**others, "student": run.recipe.student.model})
    for who, family in shared.items():
        logger.warning(
            "judge %s: %s and the %s are both of the %s family, whose answers it may favour",
            sheet.name,
            run.recipe.judge.model,
            who,
            family,
        )
    return shared
