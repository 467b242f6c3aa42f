"""Responses of checkpoints to the test prompts, and what can be said of them without a judge."""

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gadfly.checkpoint import latest_checkpoint, open_checkpoint
from gadfly.config import TRAINING_STAGES
from gadfly.data.dataset import Dataset, load_rows
from gadfly.errors import CheckpointError, ConfigError
from gadfly.model_identity import model_identity
from gadfly.records import Generation, generations_file
from gadfly.stages.examples import Example, check_context, tokenise
from gadfly.stages.roles import Writer, open_writer
from gadfly.stages.rollout import sample_groups
from gadfly.stages.run import Run
from gadfly.statistics import Figure, mean, share
from gadfly.text_metrics import repetition, rouge_l

logger = logging.getLogger(__name__)

# What a stage's folder has checkpoints as.
_STEP = re.compile(r"step-\d{6}|latest|best")


@dataclass(frozen=True)
class Model:
    """A model to generate with: the arm's name, what it is in full, and where it lies."""

    name: str
    checkpoint: str
    source: str


def check_recipe(run: Run) -> None:
    """Refuse before any training what could not be generated after it.

    Raises:
        ConfigError: two test sets would be written to one file, or a checkpoint can only be misspelt.
    """
    recipe = run.recipe
    if not recipe.data.test:
        # Nothing is generated then.
        return
    files = [generations_file(name, t) for name in recipe.data.test for t in recipe.generate.temperatures]
    if twice := sorted({file for file in files if files.count(file) > 1}):
        raise ConfigError(f"data.test: two sets would be written to generations/{twice[0]}.jsonl; rename one")
    for name in recipe.generate.checkpoints:
        # What lies in the run's own folder may still be to come.
        is_own = Path(name).is_relative_to(run.folder.path)
        if name == "base" or is_own or (run.folder.path / name).exists() or Path(name).exists():
            continue
        stage, _, step = name.partition("/")
        if stage not in TRAINING_STAGES:
            raise ConfigError(
                f"generate.checkpoints: {name!r} is neither a stage nor in {run.folder.path} nor a folder"
            )
        if step and not _STEP.fullmatch(step):
            raise ConfigError(
                f"generate.checkpoints: {name!r}: of a stage there are {stage}/latest, {stage}/best and "
                f"such as {stage}/step-000100"
            )


def generate(run: Run) -> None:
    """Write `generations/SET.jsonl` for every test set, and its figures into `summary.json`.

    What is there already of the same checkpoints and settings is kept.

    Raises:
        ConfigError: if the recipe names no test set, or as `check_recipe` says.
    """
    if not run.recipe.data.test:
        raise ConfigError('data.test: must be given to generate: test = { name = "file.jsonl" }')
    check_recipe(run)
    sets = {name: load_rows(files, needs_response=False) for name, files in run.recipe.data.test.items()}
    for name, data in sets.items():
        run.processes.check_same(f"content of data.test.{name}", data.fingerprint, "give all the same files")
        run.bad_as_read[f"test.{name}"] = data.bad
    for model in run.processes.once("checkpoints", lambda: named_models(run.alone()), is_patient=True):
        student = None
        for name, data in sets.items():
            for temperature in run.recipe.generate.temperatures:
                file = generations_file(name, temperature)
                if not _forget_stale(run, file, model, data, temperature) and _has_figures(run, file, model):
                    continue
                student = student or open_writer(run, model.source)
                examples = tokenise(run, f"test.{name}", data.rows, student.renderer)
                _sample_missing(run, file, model, student, examples, temperature)
                _write_figures(run, file, model, student, examples)
                _write_teacher_figures(run, file, student, examples)


def generate_held_out(run: Run, names: Sequence[str], file: str) -> None:
    """Write greedy answers of checkpoints to the held-out prompts that training is evaluated on.

    They go into `generations/FILE.jsonl`, and no figures are made of them.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    rows, num_prompts = run.data.valid, run.recipe.evaluation.prompts
    # Prompts over the cap are left out, as the training stages have noted.
    usable = run.folder.read_json("summary.json").get("data", {}).get("valid", {}).get("rows", len(rows))
    for model in run.processes.once("checkpoints", lambda: [_find(run.alone(), name) for name in names]):
        _forget_stale(run, file, model, Dataset(rows), 0.0)
        written = [row for row in run.folder.rows(f"generations/{file}.jsonl") if row["model"] == model.name]
        if len(written) == min(num_prompts, usable):
            continue
        student = open_writer(run, model.source)
        examples = tokenise(run, "valid", rows, student.renderer)[:num_prompts]
        _sample_missing(run, file, model, student, examples, 0.0)


def named_models(run: Run) -> list[Model]:
    """The models of `generate.checkpoints`, or by default the base and every training stage that is done.

    Raises:
        CheckpointError: if one is not there.
        ConfigError: if one is named twice.
    """
    names = run.recipe.generate.checkpoints or [
        "base",
        *(stage for stage in TRAINING_STAGES if run.folder.is_done(stage)),
    ]
    models = [_find(run, name) for name in names]
    arms = [model.name for model in models]
    if twice := sorted({arm for arm in arms if arms.count(arm) > 1}):
        raise ConfigError(f"generate.checkpoints: {', '.join(twice)} is named twice; name each model once")
    return models


def _find(run: Run, name: str) -> Model:
    if name == "base":
        source = run.recipe.student.model
        return Model("base", model_identity(source) or source, source)
    if name in TRAINING_STAGES:
        checkpoint = latest_checkpoint(run.folder.stage(name))
        if checkpoint is None:
            raise CheckpointError(
                f"generate.checkpoints: no checkpoint of {name!r} under {run.folder.path}; "
                f"run that stage first"
            )
    else:
        path = next((path for path in (run.folder.path / name, Path(name)) if path.exists()), None)
        if path is None:
            raise CheckpointError(
                f"generate.checkpoints: {name!r} is neither in {run.folder.path} nor a folder"
            )
        if not (path / "manifest.json").exists():
            # Its own name alone would be `student` for the student of any checkpoint.
            arm = "/".join(path.resolve().parts[-3:])
            return Model(arm, model_identity(str(path)) or arm, str(path))
        checkpoint = open_checkpoint(path)
    step = f"{checkpoint.path.parent.name}/{checkpoint.path.name}"
    arm = step if Path(name).is_absolute() else name
    return Model(arm, f"{step} ({checkpoint.digest[:8]})", str(checkpoint.path / "student"))


def _cap(run: Run) -> int:
    return run.recipe.generate.max_response_tokens or run.recipe.sampling.max_response_tokens


def _forget_stale(run: Run, file: str, model: Model, data: Dataset, temperature: float) -> bool:
    """Drop figures and rows of this model that were made with other settings. Returns whether it did."""
    longest, seed = run.recipe.sampling.max_prompt_tokens, run.recipe.seed
    settings = [model.checkpoint, data.fingerprint, longest, _cap(run), temperature, seed]
    state = run.folder.read_json("generations/state.json")
    key, now = f"{file}/{model.name}", "|".join(map(str, settings))
    if state.get(key) == now:
        return False
    summary = run.folder.read_json("summary.json")
    summary.get("evaluation", {}).get(model.name, {}).pop(file, None)
    # What a judge said was of the old answers too.
    for section in ("pairwise", "judge"):
        summary.get(section, {}).pop(file, None)
    run.folder.write_json("summary.json", summary)
    run.folder.keep_rows(f"generations/{file}.jsonl", lambda row: row.get("model") != model.name)
    run.folder.write_json("generations/state.json", {**state, key: now})
    return True


def _has_figures(run: Run, file: str, model: Model) -> bool:
    """Whether everything is there: figures are written when the last answer is."""
    evaluation = run.folder.read_json("summary.json").get("evaluation", {})
    has_rows = any(row.get("model") == model.name for row in run.folder.rows(f"generations/{file}.jsonl"))
    # Not by any figure: a judge may have added its own to a set that is not finished.
    return has_rows and "finished_fraction" in evaluation.get(model.name, {}).get(file, {})


def _sample_missing(
    run: Run,
    file: str,
    model: Model,
    student: Writer,
    examples: Sequence[Example],
    temperature: float,
) -> None:
    cap = _cap(run)
    check_context(student.model, [example.group.only_students() for example in examples], cap)
    rows = run.folder.rows(f"generations/{file}.jsonl")
    written = {row["id"] for row in rows if row.get("model") == model.name}
    todo = [example for example in examples if example.row.id not in written]
    # Rows are on disk after every batch, so a killed stage repeats at most one.
    size = min(run.recipe.sampling.max_parallel_responses, 64)
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        groups, _ = sample_groups(
            student.sampler,
            student.renderer,
            batch,
            group_size=1,
            temperature=temperature,
            max_response_tokens=cap,
            seed=run.recipe.seed,
            purpose=f"generate/{file}",
        )
        rows = [
            asdict(
                Generation(
                    model.name,
                    model.checkpoint,
                    example.row.id,
                    example.row.prompt,
                    branch.text,
                    branch.finished,
                )
            )
            for example, group in zip(batch, groups, strict=True)
            for branch in group.students
        ]
        run.folder.append_rows(f"generations/{file}.jsonl", rows)
        done = start + len(batch)
        logger.info(
            "generate %s %s %d/%d",
            file,
            model.name,
            done,
            len(todo),
            extra={"live": True, "last": done == len(todo)},
        )


def _write_figures(run: Run, file: str, model: Model, student: Writer, examples: Sequence[Example]) -> None:
    rows = {
        row["id"]: row
        for row in run.folder.rows(f"generations/{file}.jsonl")
        if row.get("model") == model.name
    }
    answers = [rows[example.row.id] for example in examples]
    lengths = [len(student.renderer.response_tokens(row["response"], row["finished"])) for row in answers]
    figures: dict[str, Figure] = {
        "response_tokens": mean([float(length) for length in lengths]),
        "finished_fraction": share([bool(row["finished"]) for row in answers]),
        "repetition": mean([repetition(row["response"]) for row in answers]),
    }
    # Of the prompts whose teacher responses are known.
    closeness = [
        rouge_l(row["response"], [response.text for response in example.row.responses])
        for row, example in zip(answers, examples, strict=True)
        if example.row.responses
    ]
    if closeness:
        figures["rouge_l"] = mean(closeness)
    run.folder.update_summary(
        "evaluation",
        {model.name: {file: {name: figure.as_record() for name, figure in figures.items()}}},
    )


def _write_teacher_figures(run: Run, file: str, student: Writer, examples: Sequence[Example]) -> None:
    """What can be said of the teacher's own responses, in the student's tokens: the row to hold others to."""
    responses = [example.row.responses[0] for example in examples if example.row.responses]
    if not responses:
        return
    lengths = [
        len(student.renderer.response_tokens(response.text, response.finished)) for response in responses
    ]
    figures = {
        "response_tokens": mean(lengths),
        "finished_fraction": share([response.finished for response in responses]),
        "repetition": mean([repetition(response.text) for response in responses]),
    }
    run.folder.update_summary(
        "evaluation",
        {"teacher": {file: {name: figure.as_record() for name, figure in figures.items()}}},
    )
