"""Arms that are not the product: what others say does as well."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadfly.checkpoint import latest_checkpoint
from gadfly.data.dataset import load_rows
from gadfly.groups import teacher_group
from gadfly.models import load_language_model, save_language_model
from gadfly.records import Row, generations_file
from gadfly.run_folder import write_text
from gadfly.stages.generate import generate
from gadfly.stages.run import Run, open_run
from gadfly.stages.sft import fine_tune

_SAMPLES_PER_PROMPT = 4


def train_dpo(run: Run, main: Path) -> Path:
    """SFT, then DPO on a static snapshot: the teacher's answer over the SFT student's own.

    The start is the main run's warmed-up student, as it is GAD's. One sample a prompt, drawn once, is what it
    learns to avoid: of that student, where SODA (arXiv 2604.03873) takes the untrained one's, which here may
    know nothing of the task. Steps, batch and learning rate are those that the arm's recipe has for gad; the
    rest is trl's default.

    Args:
        run: the arm's.
        main: the main run's folder.

    Returns:
        The folder of the student, under a name for what may not be whole yet.
    """
    import torch  # noqa: PLC0415  the parts of a run load once it is known to be right
    from datasets import Dataset  # noqa: PLC0415
    from transformers import PrinterCallback  # noqa: PLC0415
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        """trl's, given tokens: put together as texts, prompt and response may make others."""

        def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
            return dataset

    recipe, start = run.recipe, _last(main / "warmup")
    model, renderer = load_language_model(str(start), recipe.student.dtype)
    reference, _ = load_language_model(str(start), recipe.student.dtype)
    pairs = []
    for sample in _samples(run, start, seeds=1):
        group = teacher_group(sample.row, renderer, recipe.sampling.max_response_tokens)
        teacher, own = group.teachers[0], renderer.response_tokens(sample.text, sample.finished)
        if list(teacher.tokens) != own:
            pairs.append(
                {"prompt_ids": group.prompt_tokens, "chosen_ids": teacher.tokens, "rejected_ids": own}
            )
    torch.manual_seed(recipe.seed)
    config = DPOConfig(
        output_dir=str(run.folder.path / "trl"),
        per_device_train_batch_size=recipe.gad.batch_prompts,
        max_steps=recipe.gad.max_steps,
        learning_rate=recipe.gad.learning_rate,
        lr_scheduler_type=recipe.gad.learning_rate_schedule,
        adam_beta1=recipe.student.adam_betas[0],
        adam_beta2=recipe.student.adam_betas[1],
        weight_decay=recipe.student.weight_decay,
        max_grad_norm=recipe.student.max_grad_norm,
        max_length=None,
        seed=recipe.seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,
        bf16=False,
    )
    trainer = Tokenised(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=renderer.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    place = _unfinished(run)
    save_language_model(model, renderer.tokenizer, place)
    return place


def train_on_samples(run: Run, main: Path) -> Path:
    """SFT on samples of the discriminator's language model at the recipe's temperature.

    So it is seen whether GAD is only a way round to distil what the discriminator knows. The learning rate,
    its schedule and the number of responses seen are those of `seqkd-equal-time`.

    Args:
        run: the arm's.
        main: the main run's folder.

    Returns:
        A link to the student, under a name for what may not be whole yet.
    """
    samples = [
        sample
        for sample in _samples(run, _last(main / "discriminator-lm"), seeds=_SAMPLES_PER_PROMPT)
        if sample.text
    ]
    rows: dict[str, dict[str, Any]] = {}
    # A model that has hardly been trained may finish none.
    for sample in [sample for sample in samples if sample.finished] or samples:
        row = rows.setdefault(sample.row.id, {"prompt": sample.row.prompt, "responses": []})
        row["responses"].append(sample.text)
    file = run.folder.path / "samples-of-lm.jsonl"
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows.values()))
    plan = json.loads((main / "seqkd-equal-time" / "plan.json").read_text(encoding="utf-8"))
    settings = run.recipe.seqkd
    training = settings.model_copy(
        update={
            "max_steps": max(1, plan["steps"] // _SAMPLES_PER_PROMPT),
            "learning_rate": settings.equal_time_learning_rate or settings.learning_rate,
        }
    )
    recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"train": str(file)})})
    arm = Run(recipe, run.folder, run.trackers)
    if arm.folder.begin("seqkd", arm.stage_settings("seqkd")):
        fine_tune(arm, "seqkd", recipe.student.model, recipe.student, training)
    link = _unfinished(run)
    link.symlink_to(_last(run.folder.stage("seqkd")))
    return link


def _unfinished(run: Run) -> Path:
    """Where an arm may put a student that is not whole yet; what a killed one left there is gone."""
    place = run.folder.path / "student.unfinished"
    if place.is_symlink():
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)
    return place


@dataclass(frozen=True)
class _Sample:
    row: Row
    text: str
    finished: bool


def _samples(run: Run, model: Path, seeds: int) -> list[_Sample]:
    """What a model answers to the training prompts at the sampling temperature, once for each seed."""
    train = run.recipe.data.train
    assert train is not None, "every ground writes data/train.jsonl"
    rows = {row.id: row for row in load_rows(train, needs_response=True).rows}
    temperature = run.recipe.sampling.temperature
    file = f"generations/{generations_file('train', temperature)}.jsonl"
    samples = []
    for number in range(seeds):
        recipe = run.recipe.model_copy(
            update={
                # Far from the seeds of any other run.
                "seed": run.recipe.seed + 1000 * (number + 1),
                "run_folder": str(run.folder.path / f"samples-{number}"),
                "data": run.recipe.data.model_copy(update={"test": {"train": train}}),
                "generate": run.recipe.generate.model_copy(
                    update={"checkpoints": [str(model)], "temperatures": [temperature]}
                ),
            }
        )
        with open_run(recipe) as sampled:
            generate(sampled)
            written = sampled.folder.rows(file)
        samples += [_Sample(rows[row["id"]], row["response"], row["finished"]) for row in written]
    return samples


def _last(stage: Path) -> Path:
    checkpoint = latest_checkpoint(stage)
    assert checkpoint is not None, f"the main run has done {stage.name}"
    return checkpoint.path / "student"
