"""Small run folders for the tests of the report, and its page taken apart."""

import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gadfly.config import Recipe
from gadfly.run_folder import RunFolder
from gadfly.stages.report import Reported, report
from gadfly.stages.report.reading import read_evidence
from gadfly.stages.report.remarks import remarks
from gadfly.stages.report.remarks.remark import Remark
from gadfly.stages.report.results import ResultTable, result_tables
from gadfly.stages.report.verdict import Verdict

Row = dict[str, Any]
Shape = Callable[[float], float]

STEPS = 120
VOID = {"meta", "link", "br", "hr", "img", "input"}

# Metrics of a healthy gad stage as functions of how far it is, 0 to 1.
CLEAN: dict[str, Shape] = {
    "discriminator/accuracy": lambda done: 0.85 - 0.1 * done,
    "discriminator/score_gap": lambda done: 1.5 + math.sin(6 * done),
    "discriminator/loss": lambda done: 0.45 + 0.1 * done,
    "group/zero_variance_fraction": lambda done: 0.02,
    "group/score_std": lambda done: 0.8,
    "rollout/length_ratio": lambda done: 1.1 - 0.1 * done,
    "rollout/finished_fraction": lambda done: 0.95,
    "detail/teacher_finished_fraction": lambda done: 1.0,
    "student/kl_nats": lambda done: 0.2 * done,
    "student/entropy_nats": lambda done: 1.0 - 0.4 * done,
    "detail/sampler_gap_nats": lambda done: 1e-6,
}
HELD_OUT: dict[str, Shape] = {
    "evaluation/rouge_l": lambda done: 0.3 + 0.1 * done,
    "evaluation/repetition": lambda done: 0.1 - 0.05 * done,
    "probe/accuracy": lambda done: 0.85,
}


class Opened(Reported):
    """A run with questions to its report."""

    def page(self) -> str:
        report(self)
        return (self.folder.path / "report.html").read_text(encoding="utf-8")

    def found(self) -> list[Remark]:
        return remarks(read_evidence(self.folder, self.recipe))

    def remarks(self) -> list[str]:
        return [remark.what for remark in self.found()]

    def table(self) -> ResultTable:
        (table,) = result_tables(read_evidence(self.folder, self.recipe))
        return table

    def verdict(self) -> Verdict:
        return self.table().verdict


def empty_run(path: Path, **sections: Any) -> Opened:
    recipe = Recipe(
        name="pirate", student={"model": "tiny"}, **{"data": {"test": {"ships": "ships.jsonl"}}, **sections}
    )
    run = Opened(recipe, RunFolder(path / "pirate"))
    run.folder.write_json("config.json", recipe.model_dump(mode="json"))
    return run


def a_run(
    path: Path, *, steps: int = STEPS, planted: dict[str, Shape] | None = None, seconds: float = 60.0
) -> Opened:
    """A finished run with nothing wrong but what is planted into the metrics of gad."""
    run = empty_run(path)
    shapes = CLEAN | HELD_OUT | (planted or {})
    rows: list[Row] = []
    for step in range(steps + 1):
        row = {"stage": "gad", "step": step}
        logged = {name: shape(step / steps) for name, shape in shapes.items()}
        if step:
            rows.append(row | {n: v for n, v in logged.items() if n not in HELD_OUT} | {"time/unix": seconds})
        if step in (0, steps) or step % 50 == 0:
            rows.append(row | {name: logged[name] for name in HELD_OUT})
    rows += [{"stage": "seqkd", "step": step, "student/loss": 3 / step} for step in range(1, 41)]
    run.folder.write_rows("metrics.jsonl", rows)
    run.folder.write_rows("samples.jsonl", [evaluated(0, "aye"), evaluated(steps, "arr"), sampled(steps)])
    stages = {name: {"steps": steps, "seconds": seconds} for name in ("seqkd", "warmup", "gad")}
    run.folder.write_json(
        "summary.json",
        {
            "stages": stages | {"seqkd-equal-time": {"steps": 2 * steps, "seconds": 2 * seconds}},
            "data": {"train": {"rows": 400, "bad": {}}, "valid": {"rows": 200, "bad": {}}},
            "evaluation": evaluation(base=0.1, seqkd=0.3, **{"seqkd-equal-time": 0.35}, gad=0.6),
        },
    )
    run.folder.write_rows("generations/ships.jsonl", [generated("base", "hello"), generated("gad", "arr")])
    return run


def evaluated(step: int, response: str, **more: Any) -> Row:
    row = {"stage": "gad", "step": step, "kind": "evaluation", "id": "v", "prompt": "Greet me."}
    return row | {"teacher": "Ahoy!", "response": response, "finished": True} | more


def sampled(step: int, scores: tuple[float, ...] = (0.5, 2.5, -1.5)) -> Row:
    samples = [{"text": f"sample {place}", "finished": True, "score": s} for place, s in enumerate(scores)]
    row = {"stage": "gad", "step": step, "kind": "rollout", "id": "t", "prompt": "Sing."}
    return row | {"teacher": "Yo-ho", "samples": samples}


def generated(model: str, response: str, **more: Any) -> Row:
    row = {"model": model, "checkpoint": model, "id": "1", "prompt": "Who goes?", "response": response}
    return row | {"finished": True} | more


def figure(value: float, n: int = 200) -> Row:
    return {"value": value, "n": n, "interval": [value - 0.05, value + 0.05]}


def evaluation(main: str = "valid_fraction", **values: float) -> Row:
    lengths = {"response_tokens": figure(19.0)}
    return {model: {"ships": {main: figure(value)} | lengths} for model, value in values.items()}


def judged(
    *, gad: float = 70.0, seqkd: float = 50.0, n: int = 200, gad_tokens: float = 20.0, **noted: Any
) -> Row:
    """The summary of a run whose test set went before a judge."""
    scores = {"base": 30.0, "seqkd-equal-time": seqkd, "gad": gad, "teacher": 80.0}
    tokens = dict.fromkeys(scores, 20.0) | {"gad": gad_tokens}
    figures = {
        model: {"judge_score": figure(score, n), "response_tokens": figure(tokens[model], n)}
        for model, score in scores.items()
    }
    note = {"judge": "a-judge", "methods": ["score"], "shares_family": {}, "both_orders": True}
    unparsable = {"unparsable": dict.fromkeys(scores, 0)}
    return {
        "evaluation": {model: {"ships": row} for model, row in figures.items()},
        "judge": {"ships": note | unparsable | noted},
    }


def a_pair(
    raw: tuple[float, float], controlled: tuple[float, float], *, b: str = "seqkd-equal-time", n: int = 100
) -> Row:
    """GAD against another model before the judge, by the ends of its win rates' intervals."""
    rates = {
        name: {"value": sum(ends) / 2, "n": n, "interval": list(ends)}
        for name, ends in (("win_rate", raw), ("length_controlled_win_rate", controlled))
    }
    counts = {"win": n // 2, "tie": n // 4, "loss": n - n // 2 - n // 4, "unparsable": 0}
    return {"a": "gad", "b": b, **counts, "characters": {"gad": figure(312), b: figure(280)}, **rates}


def run_with(path: Path, summary: Row, **sections: Any) -> Opened:
    run = empty_run(path, **sections)
    run.folder.write_json("summary.json", summary)
    return run


class Page(HTMLParser):
    """A page taken apart; fails on a tag that is closed in the wrong place."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.table_parents: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]
