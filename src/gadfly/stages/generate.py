"""Responses of checkpoints to the test prompts, and what can be said of them without a judge."""

import logging
from collections.abc import Sequence
from dataclasses import asdict

from gadfly.data.dataset import Dataset, load_rows
from gadfly.errors import ConfigError
from gadfly.records import Generation, generations_file
from gadfly.stages.examples import Example, check_context, tokenise
from gadfly.stages.named_models import Model, check_names, find_model, named_models
from gadfly.stages.roles import Writer, open_writer
from gadfly.stages.rollout import sample_groups
from gadfly.stages.run import Run
from gadfly.statistics import Figure, mean, share
from gadfly.text_metrics import repetition, rouge_l

logger = logging.getLogger(__name__)


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
    check_names(run)


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
    models = run.processes.once("checkpoints", lambda: named_models(run.alone()), is_patient=True)
    for name, data in sets.items():
        for temperature in run.recipe.generate.temperatures:
            _forget_others(run, generations_file(name, temperature), models, data, temperature)
    for model in models:
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
    for model in run.processes.once("checkpoints", lambda: [find_model(run.alone(), name) for name in names]):
        _forget_stale(run, file, model, Dataset(rows), 0.0)
        written = [row for row in run.folder.rows(f"generations/{file}.jsonl") if row["model"] == model.name]
        if len(written) == min(num_prompts, usable):
            continue
        student = open_writer(run, model.source)
        examples = tokenise(run, "valid", rows, student.renderer)[:num_prompts]
        _sample_missing(run, file, model, student, examples, 0.0)


def _cap(run: Run) -> int:
    return run.recipe.generate.max_response_tokens or run.recipe.sampling.max_response_tokens


def _forget_stale(run: Run, file: str, model: Model, data: Dataset, temperature: float) -> bool:
    """Drop figures and rows of this model that were made with other settings. Returns whether it did."""
    state = run.folder.read_json("generations/state.json")
    key, now = f"{file}/{model.name}", f"{model.checkpoint}{_made_with(run, data, temperature)}"
    if state.get(key) == now:
        return False
    summary = run.folder.read_json("summary.json")
    for arm in (model.name, "teacher"):
        summary.get("evaluation", {}).get(arm, {}).pop(file, None)
    # What a judge said was of the old answers too.
    for section in ("pairwise", "judge"):
        summary.get(section, {}).pop(file, None)
    run.folder.write_json("summary.json", summary)
    run.folder.keep_rows(f"generations/{file}.jsonl", lambda row: row.get("model") != model.name)
    run.folder.write_json("generations/state.json", {**state, key: now})
    return True


def _made_with(run: Run, data: Dataset, temperature: float) -> str:
    """What decides the answers of a checkpoint: one table holds figures where it is the same."""
    longest, seed = run.recipe.sampling.max_prompt_tokens, run.recipe.seed
    return "".join(f"|{part}" for part in (data.fingerprint, longest, _cap(run), temperature, seed))


def _forget_others(run: Run, file: str, models: Sequence[Model], data: Dataset, temperature: float) -> None:
    """Drop the figures of models that are not generated with now, where they are of other settings.

    Their rows stay, and give the figures again when these models are generated with once more.
    """
    own, now = {model.name for model in models}, _made_with(run, data, temperature)
    summary = run.folder.read_json("summary.json")
    evaluation, dropped = summary.get("evaluation", {}), []
    for key, made_with in run.folder.read_json("generations/state.json").items():
        arm = key.removeprefix(f"{file}/")
        is_stale = key != arm and arm not in own and not made_with.endswith(now)
        if is_stale and evaluation.get(arm, {}).pop(file, None):
            dropped.append(arm)
    if dropped:
        run.folder.write_json("summary.json", summary)
        logger.warning(
            "generate %s: the figures of %s leave the table, being of other prompts or settings than those "
            "of %s; name them in generate.checkpoints to have them anew",
            file,
            ", ".join(dropped),
            ", ".join(sorted(own)),
        )


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
