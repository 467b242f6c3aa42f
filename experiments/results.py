"""Figures of all seeds put together: means with intervals, paired differences, and what they decide."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.experiment import FOLDER, Claim, Experiment
from gadfly.run_folder import RunFolder
from gadfly.statistics import Figure, mean_difference

Values = Mapping[int, float]
"""A figure of one model, by seed."""


@dataclass(frozen=True)
class Verdict:
    """What a paired difference says of a claim."""

    claim: Claim
    difference: Figure | None
    """Better minus worse, over the seeds that both have; None without one."""
    p: float | None = None
    """Of the paired t test, two-sided, corrected for the number of claims beside it; None below two seeds."""

    @property
    def word(self) -> str:
        """`holds` or `does not hold` where the interval is on one side of zero, else `unclear`."""
        if self.difference is None:
            return "not run"
        low, high = self.difference.low, self.difference.high
        if self.claim.lower_is_better:
            low, high = -high, -low
        # One seed shows nothing of what another would give.
        if self.difference.n < 2:
            return "unclear"
        return "holds" if low > 0 else "does not hold" if high < 0 else "unclear"


@dataclass(frozen=True)
class Results:
    """Every figure of an experiment."""

    seeds: tuple[int, ...]
    figures: Mapping[str, Mapping[str, Values]]
    """By model, then by `SET/FIGURE`."""
    seconds: Mapping[str, Values]
    """What the training of a model took, by model."""
    facts: Mapping[str, Any]
    """Command, date, machine, versions; `origins`, the digest of what made each model's figures."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Results":
        """From the content of `results.json`, as `as_record` gives it."""
        figures = {
            model: {name: _by_seed(values) for name, values in own.items()}
            for model, own in record["figures"].items()
        }
        seconds = {model: _by_seed(values) for model, values in record["seconds"].items()}
        facts = {name: record[name] for name in record.keys() - {"seeds", "figures", "seconds"}}
        return cls(tuple(record["seeds"]), figures, seconds, facts)

    def verdicts(self, claims: Sequence[Claim], figure: str) -> list[Verdict]:
        """What the seeds say of each claim, with p values that Holm's procedure has corrected (Holm 1979).

        Args:
            claims: all that are asked of these figures, since their number is what is corrected for.
            figure: what decides where a claim names none.
        """
        alone = [self._verdict(claim, figure) for claim in claims]
        tested = sorted((verdict.p, place) for place, verdict in enumerate(alone) if verdict.p is not None)
        corrected, least = dict[int, float](), 0.0
        for rank, (p, place) in enumerate(tested):
            least = max(least, min(1.0, p * (len(tested) - rank)))
            corrected[place] = least
        return [replace(verdict, p=corrected.get(place)) for place, verdict in enumerate(alone)]

    def _verdict(self, claim: Claim, figure: str) -> Verdict:
        better, worse = (
            self.figures.get(model, {}).get(claim.figure or figure, {})
            for model in (claim.better, claim.worse)
        )
        seeds = sorted(better.keys() & worse.keys())
        if not seeds:
            return Verdict(claim, None)
        pairs = [better[s] for s in seeds], [worse[s] for s in seeds]
        return Verdict(claim, mean_difference(*pairs), _paired_p(*pairs))

    def without(self, seeds: Collection[int]) -> "Results":
        """All but what is of these seeds."""

        def kept(values: Mapping[str, Values]) -> dict[str, Values]:
            left = {
                name: {seed: value for seed, value in own.items() if seed not in seeds}
                for name, own in values.items()
            }
            return {name: own for name, own in left.items() if own}

        return Results(
            tuple(seed for seed in self.seeds if seed not in seeds),
            {model: figures for model, own in self.figures.items() if (figures := kept(own))},
            kept(self.seconds),
            self.facts,
        )

    def as_record(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            **self.facts,
            "seeds": list(self.seeds),
            "figures": {
                model: {name: _by_text(values) for name, values in figures.items()}
                for model, figures in self.figures.items()
            },
            "seconds": {model: _by_text(values) for model, values in self.seconds.items()},
        }

    def with_earlier(self, earlier: "Results") -> "Results":
        """These, and what `results.json` holds of other seeds and arms, whose run folders may be elsewhere.

        Nothing is taken from what another command made, or of models and arms that were others then.
        """
        before, now = earlier.facts.get("origins", {}), self.facts["origins"]
        same = [model for model in earlier.figures if model in now and before.get(model) == now[model]]
        if earlier.facts["command"] != self.facts["command"] or "gad" not in same:
            return self
        old = {model: earlier.figures[model] for model in same}
        took = {model: earlier.seconds[model] for model in same if model in earlier.seconds}
        figures = {
            model: _merged(old.get(model, {}), self.figures.get(model, {})) for model in [*old, *self.figures]
        }
        machines = {*earlier.facts["machine"].split("; "), *self.facts["machine"].split("; ")} - {""}
        facts = {
            **self.facts,
            "date": max(earlier.facts["date"], self.facts["date"]),
            "machine": "; ".join(sorted(machines)),
            "packages": self.facts["packages"] or earlier.facts["packages"],
        }
        seeds = tuple(sorted({*self.seeds, *earlier.seeds}))
        return Results(seeds, figures, _merged(took, self.seconds), facts)


def _paired_p(better: Sequence[float], worse: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; None where one pair says nothing about spread."""
    from scipy.stats import ttest_rel  # noqa: PLC0415  takes half a second

    if len(better) < 2:
        return None
    # Rounding makes a spread of some 1e-17 where there is none, and the test divides by it.
    differences = {round(a - b, 12) for a, b in zip(better, worse, strict=True)}
    if len(differences) == 1:
        return float(differences == {0.0})
    return float(ttest_rel(better, worse).pvalue)


def kept_results(name: str) -> Results | None:
    """What `results.json` of an experiment holds; None where it has none."""
    file = FOLDER / name / "results.json"
    return Results.of_record(json.loads(file.read_bytes())) if file.exists() else None


def collect_results(
    name: str,
    experiment: Experiment,
    folder: Path,
    settings: Sequence[str],
    ground_settings: Mapping[str, Any],
    seeds: Sequence[int] | None,
) -> Results:
    """Read what the seeds in a folder have measured, as far as it is of these settings.

    Args:
        name: the experiment's.
        experiment: what it consists of.
        folder: where its seeds are.
        settings: more `key=value` of every run.
        ground_settings: what the ground made of data and models.
        seeds: which. Default: all that nothing was chosen on.
    """
    figures: dict[str, dict[str, dict[int, float]]] = {}
    seconds: dict[str, dict[int, float]] = {}
    origins = experiment.origins(settings, ground_settings)
    places = [
        place
        for place in sorted(folder.glob("seed-*"), key=_seed)
        if (_seed(place) not in experiment.tuning_seeds if seeds is None else _seed(place) in seeds)
        and _is_of(place, origins["gad"])
    ]
    for place in places:
        seed = _seed(place)
        main = RunFolder(place).read_json("summary.json")
        took = {stage: float(facts["seconds"]) for stage, facts in main.get("stages", {}).items()}
        for model in experiment.models:
            _add(figures, model, seed, main["evaluation"].get(model, {}))
            parts = {"gad": ("discriminator-lm", "warmup", "gad"), "warmup": ("warmup",)}.get(model, (model,))
            if any(part in took for part in parts):
                seconds.setdefault(model, {})[seed] = sum(took.get(part, 0.0) for part in parts)
        for arm, kind in experiment.arms.items():
            run = RunFolder(place / "arms" / arm)
            if _is_of(run.path, origins[arm]):
                summary = run.read_json("summary.json")
                # An arm's run generates its own student alone; the teacher's figures may stand beside it.
                (own,) = (model for model in summary["evaluation"] if model != "teacher")
                _add(figures, arm, seed, summary["evaluation"][own])
                stages = summary.get("stages", {})
                # What an arm of another kind trains is timed whole, whatever stages it borrows.
                timed = [stages["student"]] if "student" in stages else stages.values()
                own_seconds = sum(float(facts["seconds"]) for facts in timed)
                shared = sum(took.get(stage, 0.0) for stage in kind.shared_stages)
                seconds.setdefault(arm, {})[seed] = own_seconds + shared
    facts = _facts(name, settings, places) | {"origins": origins}
    return Results(tuple(map(_seed, places)), figures, seconds, facts)


def _is_of(place: Path, origin: str) -> bool:
    run = RunFolder(place)
    return bool(run.read_json("measured.json")) and run.read_json("origin.json").get("origin") == origin


def _seed(place: Path) -> int:
    return int(place.name.partition("-")[2])


def _add(
    figures: dict[str, dict[str, dict[int, float]]], model: str, seed: int, evaluation: Mapping[str, Any]
) -> None:
    for test_set, measured in evaluation.items():
        for figure, record in measured.items():
            place = figures.setdefault(model, {}).setdefault(f"{test_set}/{figure}", {})
            place[seed] = float(record["value"])


def _facts(name: str, settings: Sequence[str], places: Sequence[Path]) -> dict[str, Any]:
    """What the figures were made by: of several seeds, the newest date, and every machine."""
    made = [RunFolder(place).read_json("measured.json") for place in places]
    environments = [RunFolder(place).read_json("environment.json") for place in places]
    return {
        "experiment": name,
        "command": " ".join(["python -m experiments", name, *settings]),
        "date": max((facts["date"] for facts in made), default=""),
        "machine": "; ".join(sorted({facts["machine"] for facts in made})),
        "packages": environments[0]["packages"] if environments else {},
    }


def _merged(old: Mapping[str, Values], new: Mapping[str, Values]) -> dict[str, Values]:
    return {name: {**old.get(name, {}), **new.get(name, {})} for name in [*old, *new]}


def _by_seed(values: Mapping[str, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in values.items()}


def _by_text(values: Values) -> dict[str, float]:
    return {str(seed): value for seed, value in sorted(values.items())}
