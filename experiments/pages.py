"""Results as Markdown and as a picture: the block in an experiment's README, and `docs/results.md`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.experiment import FOLDER, Experiment, load_experiment, names
from experiments.results import Results, Verdict, kept_results
from gadfly.run_folder import write_text
from gadfly.statistics import Figure, mean

_BEGIN, _END = "<!-- results: written by `python -m experiments`, not by hand -->", "<!-- end of results -->"
_PAGE = FOLDER.parent / "docs" / "results.md"


def write_pages(name: str, experiment: Experiment, results: Results, *, is_kept: bool) -> str:
    """Write `results.json`, the figure, the README's block and `docs/results.md`; returns the block."""
    block = _block(experiment, results)
    if is_kept:
        place = FOLDER / name
        write_text(place / "results.json", json.dumps(results.as_record(), indent=1) + "\n")
        _draw(experiment, results, place / "figure.svg")
        readme = place / "README.md"
        text = readme.read_text(encoding="utf-8")
        inside = re.compile(re.escape(_BEGIN) + ".*" + re.escape(_END), re.DOTALL)
        write_text(readme, inside.sub(lambda _: f"{_BEGIN}\n\n{block}\n{_END}", text))
        write_text(_PAGE, page())
    return block


def page() -> str:
    """`docs/results.md`: question and results of every experiment that has been run."""
    kept = {name: results for name in names() if (results := kept_results(name))}
    parts = [
        "# Results\n\nWritten by `python -m experiments`, from the folders of [experiments](../experiments); "
        "each has set-up, reading and all figures by seed. Intervals are 95 %, Student's t over seeds; "
        "differences are paired by seed; *2 of 5* beside a figure: so many seeds have it, and where it is "
        "two, both are given. A claim *holds* or *does not hold* where the interval of its difference is on "
        "one side of zero. p is the paired t test's, corrected for the number of claims in the same table "
        "of its experiment (Holm): a claim that holds with a p above .05 would not, if all of them were to "
        "hold together. `alpaca` has the same test prompts for every seed, so that its intervals say nothing "
        "about other prompts; all others have new ones.\n",
        _tested_again(kept),
    ]
    for name, results in kept.items():
        experiment = load_experiment(name)
        block = _block(experiment, results).replace("](figure.svg)", f"](../experiments/{name}/figure.svg)")
        parts.append(
            f"## [{experiment.title}](../experiments/{name}/README.md)\n\n{experiment.question}\n\n{block}"
        )
    return "\n".join(parts)


def _tested_again(kept: Mapping[str, Results]) -> str:
    """Every claim of the paper that an experiment tests, with what each says of it."""
    rows: dict[str, list[str]] = {}
    for name, results in kept.items():
        experiment = load_experiment(name)
        for verdict in results.verdicts(experiment.claims, experiment.figure):
            if verdict.claim.paper:
                where = f"[{name}](../experiments/{name}/README.md)"
                row = f"| {verdict.claim.paper} | {where} {_row(verdict)}"
                rows.setdefault(verdict.claim.paper, []).append(row)
    head = [
        "| of the paper | in | as tested | verdict | difference | p, corrected | seeds |",
        "|---" * 7 + "|",
    ]
    return "\n".join(["## The paper's claims\n", *head, *(row for part in rows.values() for row in part), ""])


def _block(experiment: Experiment, results: Results) -> str:
    seeds = f"seeds {', '.join(map(str, results.seeds))}" if results.seeds else "no seed has been run"
    facts = results.facts
    lines = [
        f"    {facts['command']} --seeds {len(results.seeds)}\n",
        f"{facts['date']}, {seeds}; {facts['machine']}.\n",
        _table(experiment, results),
    ]
    if experiment.claims:
        lines += ["", _claims(experiment, results)]
    if results.seeds:
        lines += ["", f"![{experiment.figures.get(experiment.figure, experiment.figure)}](figure.svg)"]
    return "\n".join(lines) + "\n"


def _table(experiment: Experiment, results: Results) -> str:
    columns = experiment.figures
    lines = [
        "| | " + " | ".join([*columns.values(), "training, s", "seeds"]) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for model, title in experiment.titles.items():
        if model not in results.figures:
            continue
        count = len(results.figures[model].get(experiment.figure, {}))
        cells = [_cell(list(results.figures[model].get(figure, {}).values()), count) for figure in columns]
        seconds = results.seconds.get(model, {})
        took = f"{sum(seconds.values()) / len(seconds):.0f}" if seconds else "–"  # noqa: RUF001
        lines.append(f"| {title} | " + " | ".join([*cells, took, str(count)]) + " |")
    return "\n".join(lines)


def _claims(experiment: Experiment, results: Results) -> str:
    lines = ["| claim | verdict | difference | p, corrected | seeds |", "|---" * 5 + "|"]
    lines += [_row(verdict) for verdict in results.verdicts(experiment.claims, experiment.figure)]
    return "\n".join(lines)


def _row(verdict: Verdict) -> str:
    difference = verdict.difference
    words = f"{difference.value:+.3f} ({_ends(difference)})" if difference else "–"  # noqa: RUF001
    p = "–" if verdict.p is None else "<.001" if verdict.p < 0.001 else f"{verdict.p:.3f}"  # noqa: RUF001
    count = difference.n if difference else 0
    return f"| {verdict.claim.says} | **{verdict.word}** | {words} | {p} | {count} |"


def _cell(values: Sequence[float], seeds: int) -> str:
    if not values:
        return "–"  # noqa: RUF001
    figure = mean(values)
    fewer = "" if figure.n == seeds else f" ({figure.n} of {seeds})"
    if figure.n == 1:
        return f"{figure.value:.3f}{fewer}"
    if figure.n == 2:
        # The interval of two is mostly wider than the range that a figure can have at all.
        return f"{min(values):.3f}, {max(values):.3f}{fewer}"
    # Half of the interval's width: it is the same on both sides.
    return f"{figure.value:.3f} ± {figure.high - figure.value:.3f}{fewer}"


def _ends(figure: Figure) -> str:
    return f"{figure.low:+.3f} to {figure.high:+.3f}" if figure.n > 1 else "no interval"


def _draw(experiment: Experiment, results: Results, file: Path) -> None:
    """The figure that decides: a dot a seed, the mean as a line."""
    import matplotlib  # noqa: PLC0415  takes a second

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gadfly"
    import matplotlib.pyplot as plt  # noqa: PLC0415

    models = [model for model in experiment.titles if experiment.figure in results.figures.get(model, {})]
    figure, axes = plt.subplots(figsize=(7.5, 0.8 + 0.3 * len(models)), layout="constrained")
    for place, model in enumerate(reversed(models)):
        values = list(results.figures[model][experiment.figure].values())
        colour = "#c2410c" if model == "gad" else "#475569"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=6)
        axes.plot([sum(values) / len(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(models)), [experiment.titles[model] for model in reversed(models)])
    axes.set_xlabel(f"{experiment.figures.get(experiment.figure, experiment.figure)}, a dot a seed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
