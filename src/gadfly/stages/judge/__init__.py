"""The judge stage: what is to be said of the generations by somebody other than the discriminator.

Three methods, each in a file of its own: `score` and `pairwise` ask a judge model through its API, `tell`
needs none. What was asked is in `verdicts/answers.jsonl`. What was read from it, in `verdicts/SET.jsonl`, and
the figures, in `summary.json`, are of the last time that a set was judged: of one judge, one way.
"""

import logging
from dataclasses import dataclass, field

from gadfly.api.api_key import ApiKey
from gadfly.run_folder import Record, merge
from gadfly.stages.judge.answer_sheets import AnswerSheet, answer_sheets
from gadfly.stages.judge.bench import Bench
from gadfly.stages.judge.families import shared_family
from gadfly.stages.judge.judge_prompt import load_prompt
from gadfly.stages.judge.pairwise import pairwise
from gadfly.stages.judge.score import score
from gadfly.stages.judge.tell_figures import embedder, tell_figures
from gadfly.stages.run import Run
from gadfly.statistics import Figure

logger = logging.getLogger(__name__)

_FIGURES = ("judge_score", "judge_score_of_means", "tell_accuracy", "tell_accuracy_same_length")


def check_recipe(run: Run) -> None:
    """Refuse before any training what would end the judging after it.

    Raises:
        ConfigError: a judge is to be asked and none is named, or its key or a prompt's file is missing.
    """
    config = run.recipe.judge
    methods = {config.method} if isinstance(config.method, str) else set(config.method)
    wanted = (methods if run.recipe.data.test else set()) | {run.recipe.checkpoints.best_by}
    for method, prompt in (("score", config.score_prompt), ("pairwise", config.pairwise_prompt)):
        if method in wanted:
            Bench(run, method)
            ApiKey.of(config, "judge")
            load_prompt(prompt or method)


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
    embed = embedder(run) if "tell" in methods else None
    for sheet in answer_sheets(run):
        judgement = _Judgement({"methods": []})
        if {"score", "pairwise"} & set(methods):
            judgement.noted |= {"judge": config.model, "shares_family": _shared(run, sheet)}
        if "score" in methods:
            judgement.figures, rows, noted = score(run, sheet)
            judgement.verdicts += rows
            judgement.noted |= {"both_orders": config.both_orders, **noted}
            _note(run, sheet, judgement, "score")
        if "pairwise" in methods:
            judgement.pairs, rows = pairwise(run, sheet)
            judgement.verdicts += rows
            _note(run, sheet, judgement, "pairwise")
        if "tell" in methods:
            for model, figures in tell_figures(sheet, embed).items():
                judgement.figures.setdefault(model, {}).update(figures)
            _note(run, sheet, judgement, "tell")
        logger.info("judge %s: done, %s", sheet.name, ", ".join(methods))


@dataclass
class _Judgement:
    """What has been said of a test set so far."""

    noted: Record
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    pairs: dict[str, Record] = field(default_factory=dict)
    verdicts: list[Record] = field(default_factory=list)


def _note(run: Run, sheet: AnswerSheet, judgement: _Judgement, method: str) -> None:
    """Put what has been said, by this method too, in place of all that was said of the set before."""
    judgement.noted["methods"].append(method)
    summary = run.folder.read_json("summary.json")
    evaluation = summary.setdefault("evaluation", {})
    for sets in evaluation.values():
        for name in _FIGURES:
            sets.get(sheet.name, {}).pop(name, None)
    for model, figures in judgement.figures.items():
        records = {name: figure.as_record() for name, figure in figures.items()}
        merge(evaluation, {model: {sheet.name: records}})
    for section, content in (("pairwise", judgement.pairs), ("judge", judgement.noted)):
        summary.setdefault(section, {})[sheet.name] = content
    run.folder.write_json("summary.json", summary)
    file = f"verdicts/{sheet.name}.jsonl"
    if judgement.verdicts or (run.folder.path / file).exists():
        run.folder.write_rows(file, judgement.verdicts)


def _shared(run: Run, sheet: AnswerSheet) -> Record:
    """Who is of the judge's family: such a judge favours its like, which the report must say."""
    teachers = {response.teacher for row in sheet.rows for response in row.responses}
    # A test set seldom says whose its answers are; the recipe may, and what was collected does.
    teachers |= {
        run.recipe.teacher.model,
        *run.folder.read_json("summary.json").get("collect", {}).get("teachers", ()),
    }
    others = {f"teacher ({name})": name for name in sorted(name for name in teachers if name)}
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
