"""The demo: every stage of the method on a scripted teacher, and an exact count of valid answers.

It is a user of the product, not a part of it: it writes data, models and a recipe into a folder,
runs the stages, and adds what only its oracle knows to the figures of the summary.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from gadfly.config import Recipe
from gadfly.demo.models import save_models, save_rows
from gadfly.demo.scripted_teacher import Verdict, judge, parse_prompt, style_shares, variety
from gadfly.recipe_file import load_recipe
from gadfly.run_folder import RunFolder, write_text
from gadfly.stages.gad import gad
from gadfly.stages.generate import generate
from gadfly.stages.report import report
from gadfly.stages.run import open_run
from gadfly.stages.sft import seqkd, seqkd_equal_time
from gadfly.stages.warmup import warmup
from gadfly.statistics import bootstrap, share

# Figures of the oracle, beside those that `generate` counts for every model.
_VALID, _VARIETY, _STYLE = "valid_fraction", "variety_nats", "larger_style_fraction"


def run_demo(folder: Path, seed: int, overrides: Sequence[str] = ()) -> str:
    """Run the demo in a folder, or go on with it, and return its table as text."""
    recipe = _prepare(folder, seed, overrides)
    with open_run(recipe) as run:
        for stage in (seqkd, warmup, gad, seqkd_equal_time, generate):
            stage(run)
        count_valid_answers(run.folder)
        report(run)
        return _table(run.folder)


def _prepare(folder: Path, seed: int, overrides: Sequence[str]) -> Recipe:
    """Write recipe, data and models; all follow from the seed, so writing them again changes nothing."""
    text = resources.files("gadfly").joinpath("recipes/demo.toml").read_text(encoding="utf-8")
    write_text(folder / "recipe.toml", text.replace("\nseed = 0\n", f"\nseed = {seed}\n"))
    save_rows(folder / "data", seed)
    save_models(folder / "models", seed)
    return load_recipe(folder / "recipe.toml", overrides)


def count_valid_answers(folder: RunFolder) -> None:
    """Let the oracle judge the generations for every test set, and put its figures into `summary.json`."""
    evaluated = folder.read_json("summary.json")["evaluation"]
    for file in sorted((folder.path / "generations").glob("*.jsonl")):
        rows = folder.rows(f"generations/{file.name}")
        for model in dict.fromkeys(row["model"] for row in rows):
            if file.stem not in evaluated.get(model, {}):
                # Answers to held-out prompts, which `best` chooses by.
                continue
            verdicts = [_verdict(row) for row in rows if row["model"] == model]
            valid = [verdict.valid for verdict in verdicts]
            figures = {
                _VALID: share(valid),
                _VARIETY: bootstrap(verdicts, variety),
                _STYLE: bootstrap(verdicts, lambda some: max(style_shares(some).values())),
            }
            records = {name: figure.as_record() for name, figure in figures.items()}
            folder.update_summary("evaluation", {model: {file.stem: records}})


def _verdict(row: dict[str, Any]) -> Verdict:
    verdict = judge(parse_prompt(row["prompt"]), row["response"])
    # The teacher ends every answer by itself: one that ran into the cap is not its own.
    return verdict if row["finished"] else replace(verdict, valid=False, why="unfinished")


def _table(folder: RunFolder) -> str:
    evaluation = folder.read_json("summary.json")["evaluation"]
    columns = (
        ("valid, greedy", "test", _VALID),
        ("valid, T = 1", "test-t1", _VALID),
        ("variety, T = 1 (nats)", "test-t1", _VARIETY),
    )
    lines = ["".join([f"{'model':<20}", *(f"{title:<26}" for title, _, _ in columns), "n"])]
    for model, sets in evaluation.items():
        # The recipe may be told of other temperatures than the table's.
        shown = [sets.get(name, {}).get(figure) for _, name, figure in columns]
        if counts := [figure["n"] for figure in shown if figure]:
            # Not the teacher, who wrote the test set's answers: the oracle is asked about models.
            cells = [_cell(figure) if figure else "-" for figure in shown]
            lines.append("".join([f"{model:<20}", *(f"{cell:<26}" for cell in cells), str(counts[0])]))
    lines.append("In brackets: 95 % intervals over the records of one seed.")
    return "\n".join(lines)


def _cell(figure: dict[str, float | list[float]]) -> str:
    low, high = figure["interval"]  # type: ignore[misc]
    return f"{figure['value']:.3f} [{low:.3f}, {high:.3f}]"
