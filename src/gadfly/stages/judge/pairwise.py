"""`pairwise`: two models' answers side by side, in both orders; raw and length-controlled win rates."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from gadfly.analysis.win_rates import Outcome, length_controlled_win_rate, win_rate
from gadfly.errors import UserError
from gadfly.run_folder import Record
from gadfly.stages.judge.answer_sheets import TEACHER, AnswerSheet
from gadfly.stages.judge.bench import Bench
from gadfly.stages.judge.judge_prompt import load_prompt
from gadfly.stages.judge.pairwise_protocol import Preference, outcome, parse_preference
from gadfly.stages.run import Run
from gadfly.statistics import mean

logger = logging.getLogger(__name__)

# With A first, with B first; None where it could not be read.
_BothOrders = tuple[Preference | None, Preference | None]

_RIVALS_OF_GAD = ("seqkd-equal-time", "seqkd", "base", TEACHER)


class _Place(NamedTuple):
    a: str
    b: str
    id: str
    a_first: bool


def pairwise(run: Run, sheet: AnswerSheet) -> tuple[dict[str, Record], list[Record]]:
    """Compare pairs of models on a test set.

    Returns:
        The result of each pair, by its name `A vs B`, and the verdicts as rows.

    Raises:
        ConfigError: no judge is named, or its prompt file is wrong.
        ApiError: the judge cannot be asked, or left questions unanswered.
        UserError: a pair names a model without answers.
    """
    bench = Bench(run, "pairwise")
    prompt = load_prompt(run.recipe.judge.pairwise_prompt or "pairwise")
    pairs = _pairs(run, sheet)
    cases = {}
    for a, b in pairs:
        for row in sheet.answered_by(a, b):
            both = (sheet.answers[a][row.id], sheet.answers[b][row.id])
            for a_first in (True, False):
                first, second = both if a_first else reversed(both)
                place = _Place(a, b, row.id, a_first)
                cases[place] = prompt.fill(prompt=row.prompt, first=first, second=second)
    label = f"judge {sheet.name} pairwise"
    found, texts = bench.verdicts(label, cases, _read)
    # mypy takes three literals of a type variable for a mere str.
    preferences = cast("dict[_Place, Preference | None]", found)
    results = {}
    for a, b in pairs:
        asked = {
            row.id: (preferences[_Place(a, b, row.id, True)], preferences[_Place(a, b, row.id, False)])
            for row in sheet.answered_by(a, b)
        }
        results[f"{a} vs {b}"] = _result(sheet, a, b, asked)
    rows = [
        {"method": "pairwise", **place._asdict(), "preferred": preference, "verdict": texts[place]}
        for place, preference in preferences.items()
    ]
    return results, rows


def _read(_: _Place, text: str) -> Preference | None:
    return parse_preference(text)


def _pairs(run: Run, sheet: AnswerSheet) -> list[tuple[str, str]]:
    if not run.recipe.judge.pairs:
        pairs = [("gad", rival) for rival in _RIVALS_OF_GAD if {"gad", rival} <= set(sheet.judged)]
        if not pairs:
            logger.warning(
                "judge %s: no pairs, since they are of gad by default; name judge.pairs", sheet.name
            )
        return pairs
    pairs = [(a, b) for a, b in run.recipe.judge.pairs]
    for model in {model for pair in pairs for model in pair}:
        if model not in sheet.answers:
            known = ", ".join(sheet.answers)
            raise UserError(f"judge.pairs: {model!r} has no answers to {sheet.name!r}; there are {known}")
    return pairs


def _result(sheet: AnswerSheet, a: str, b: str, asked: Mapping[str, _BothOrders]) -> Record:
    read: dict[str, Outcome] = {id_: found for id_, both in asked.items() if (found := outcome(*both))}
    counts = Counter(read.values())
    named = Counter(preference for id_ in read for preference in asked[id_])
    lengths = {model: [len(sheet.answers[model][id_]) for id_ in asked] for model in (a, b)}
    result: Record = {
        "a": a,
        "b": b,
        **{name: counts[name] for name in ("win", "tie", "loss")},
        "agreed_ties": sum(both == ("tie", "tie") for both in asked.values()),
        "named": {place: named[place] for place in ("first", "second", "tie")},
        "unparsable": len(asked) - len(read),
        "characters": {model: _mean_length(texts) for model, texts in lengths.items()},
    }
    if read:
        differences = [len(sheet.answers[a][id_]) - len(sheet.answers[b][id_]) for id_ in read]
        result["win_rate"] = win_rate(list(read.values())).as_record()
        controlled = length_controlled_win_rate(list(read.values()), differences)
        result["length_controlled_win_rate"] = controlled.as_record()
    return result


def _mean_length(lengths: Sequence[int]) -> Record | None:
    return mean(lengths).as_record() if lengths else None
