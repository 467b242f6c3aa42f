"""What a run folder holds so far, read once.

Any file may be missing: a run can be looked at while it goes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gadfly.config import TRAINING_STAGES, Recipe
from gadfly.metrics import without_time
from gadfly.run_folder import Record, RunFolder
from gadfly.statistics import Figure

# A larger value is a number on paper only: a sum of such squares is beyond all floats.
_MOST = 1e100

# Evaluation of the models: model, test set, name of the figure.
Evaluation = dict[str, dict[str, dict[str, Figure]]]


@dataclass
class Curve:
    """One metric over the steps of a stage, finite values only."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StageState:
    """How far a training stage has got, and with which settings it was begun."""

    name: str
    steps: int
    seconds: float | None
    """Wall time; None while it is not finished."""
    best_step: int | None
    settings: Record


@dataclass(frozen=True)
class Evidence:
    """Everything the page is made from."""

    recipe: Recipe
    environment: Record
    stages: dict[str, StageState]
    data: Record
    evaluation: Evaluation
    curves: dict[str, dict[str, Curve]]
    samples: list[Record]
    generations: dict[str, list[Record]]
    pairwise: Record = field(default_factory=dict)
    """By test set and pair, as the judge stage wrote it; so are the next two, by test set and by stage."""
    judge: Record = field(default_factory=dict)
    best: Record = field(default_factory=dict)
    collect: Record = field(default_factory=dict)
    """What the teacher was asked; empty if its answers came from elsewhere."""
    audit: Record = field(default_factory=dict)
    """What the audit found, before training and after warmup."""
    alarms: list[Record] = field(default_factory=list)
    remedies: list[Record] = field(default_factory=list)
    """What stages went back for."""

    def curve(self, stage: str, metric: str) -> Curve | None:
        """A curve with at least one point; None if there is none."""
        curve = self.curves.get(stage, {}).get(metric)
        return curve if curve and curve.values else None

    @property
    def test_sets(self) -> list[str]:
        """Names of the test sets with figures, in the order they were written."""
        return list(dict.fromkeys(name for sets in self.evaluation.values() for name in sets))

    def figures_of(self, test_set: str) -> dict[str, dict[str, Figure]]:
        """The figures of every model that has any on a test set."""
        return {model: sets[test_set] for model, sets in self.evaluation.items() if test_set in sets}

    @property
    def held_out_prompts(self) -> int:
        """Prompts of the evaluations while training: as many as asked for, or all that were held out."""
        return self._at_most(self.recipe.evaluation.prompts, "valid")

    @property
    def batch_prompts(self) -> int:
        """Prompts of a GAD step: as many as asked for, or all there are."""
        return self._at_most(self.recipe.gad.batch_prompts, "train")

    def _at_most(self, wanted: int, data: str) -> int:
        return min(wanted, self.data[data]["rows"]) if data in self.data else wanted


def read_evidence(folder: RunFolder, recipe: Recipe) -> Evidence:
    """Read a run folder.

    Raises:
        RunFolderError: a JSON file of the folder is not valid.
    """
    summary = folder.read_json("summary.json")
    curves = _curves(folder.rows("metrics.jsonl"))
    stages = _stages(folder, summary.get("stages", {}), curves)
    generations = sorted((folder.path / "generations").glob("*.jsonl"))
    return Evidence(
        recipe=recipe,
        environment=_environment(folder),
        stages=stages,
        data=summary.get("data", {}),
        evaluation=_evaluation(summary.get("evaluation", {})),
        curves=curves,
        samples=folder.rows("samples.jsonl"),
        audit=folder.read_json("audit.json"),
        alarms=folder.rows("alarms.jsonl"),
        remedies=[row for name in TRAINING_STAGES for row in folder.rows(f"{name}/remedies.jsonl")],
        generations={path.stem: folder.rows(f"generations/{path.name}") for path in generations},
        **{part: summary.get(part, {}) for part in ("pairwise", "judge", "best", "collect")},
    )


def _environment(folder: RunFolder) -> Record:
    """What the newest stage was trained by; where nothing was trained, what the last command ran on."""
    trained = (
        folder.read_json(f"{name}/stage.json").get("environment") for name in reversed(TRAINING_STAGES)
    )
    return next(filter(None, trained), None) or folder.read_json("environment.json")


def _curves(rows: Iterable[Record]) -> dict[str, dict[str, Curve]]:
    curves: dict[str, dict[str, Curve]] = defaultdict(lambda: defaultdict(Curve))
    for row in rows:
        stage = curves[row["stage"]]
        for name, value in without_time(row).items():
            if name in ("stage", "step"):
                continue
            if isinstance(value, int | float) and -_MOST < value < _MOST:
                stage[name].steps.append(float(row["step"]))
                stage[name].values.append(float(value))
    return {stage: dict(metrics) for stage, metrics in curves.items()}


def _stages(
    folder: RunFolder, finished: Record, curves: dict[str, dict[str, Curve]]
) -> dict[str, StageState]:
    stages = {}
    for name in dict.fromkeys((*TRAINING_STAGES, *finished, *curves)):
        # A name from a row is no path to follow.
        begun = folder.read_json(f"{name}/stage.json") if name in TRAINING_STAGES else {}
        reached = [curve.steps[-1] for curve in curves.get(name, {}).values() if curve.steps]
        if name not in finished and not reached and not begun:
            continue
        facts = finished.get(name, {})
        stages[name] = StageState(
            name,
            steps=int(facts.get("steps", max(reached, default=0))),
            seconds=float(facts["seconds"]) if "seconds" in facts else None,
            best_step=_best_step(folder, name) if name in TRAINING_STAGES else None,
            settings=begun.get("settings") or {},
        )
    return stages


def _best_step(folder: RunFolder, stage: str) -> int | None:
    link = folder.stage(stage) / "best"
    number = link.readlink().name.removeprefix("step-") if link.is_symlink() else ""
    return int(number) if number.isdecimal() else None


def _evaluation(models: dict[str, Any]) -> Evaluation:
    return {
        model: {
            name: {
                figure: found
                for figure, record in figures.items()
                if (found := read_figure(record)) is not None
            }
            for name, figures in sets.items()
        }
        for model, sets in models.items()
    }


def read_figure(record: Record | None) -> Figure | None:
    """A figure as `summary.json` holds it; None where there is none, or its value is not finite.

    Example:
        >>> read_figure({"value": 0.5, "n": 10, "interval": [0.24, 0.76]})
        Figure(value=0.5, n=10, low=0.24, high=0.76)
    """
    value = record["value"] if record else None
    if not (record and isinstance(value, int | float) and math.isfinite(value)):
        return None
    low, high = record["interval"]
    return Figure(
        float(value),
        record["n"],
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )
