"""Warmup against a slow twin: written out again, one response at a time, in float64."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_gad import (
    DiscriminatorTwin,
    Twin,
    as_examples,
    assert_same_weights,
    draw,
    pair_losses,
    prompt_ids,
    teacher_surprises,
)
from tiny import sharp_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from gadfly.checkpoint import drop_checkpoints_after
from gadfly.models import load_language_model, save_language_model
from gadfly.recipe_file import load_recipe
from gadfly.stages.examples import Batches
from gadfly.stages.run import open_run
from gadfly.stages.warmup import Plan, warmup

TEMPERATURE = 0.6
DISCRIMINATOR_RATE = 2e-3
# Who moves at each step, on which batch, and the student's share of its rate: two steps of the discriminator
# alone, four of the student with the discriminator at every second, two of the discriminator alone.
STEPS = (
    ("discriminator", 1, 0.0),
    ("discriminator", 2, 0.0),
    ("student", 1, 1.0),
    ("both", 2, (1 + 0.5**0.5) / 2),
    ("student", 3, 0.5),
    ("both", 4, (1 - 0.5**0.5) / 2),
    ("discriminator", 5, 0.0),
    ("discriminator", 6, 0.0),
)


@pytest.fixture
def sharp_folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose samples depend on the temperature, saved."""
    _, renderer = load_language_model(str(tiny_model), "float32")
    save_language_model(sharp_model(tiny_model), renderer.tokenizer, tmp_path / "sharp")
    return tmp_path / "sharp"


def test_warmup_is_algorithm_1(recipe_file: Path, sharp_folder: Path) -> None:
    settings = [
        f"student.model={sharp_folder}",
        "student.dtype=float64",
        "discriminator.adam_betas=[0.8, 0.9]",
        "discriminator.max_grad_norm=0.5",
        "seed=3",
        "warmup.learning_rate_schedule=cosine",
        "warmup.discriminator_every=2",
        f"warmup.discriminator_learning_rate={DISCRIMINATOR_RATE}",
        f"sampling.temperature={TEMPERATURE}",
        "engine.micro_batch_tokens=200",
    ]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        recipe, rows = run.recipe, run.data.train
        logged = [row for row in run.folder.rows("metrics.jsonl") if "evaluation/rouge_l" not in row]
    tokenizer = AutoTokenizer.from_pretrained(sharp_folder)
    model = AutoModelForCausalLM.from_pretrained(sharp_folder, dtype=torch.float64)
    student = Twin(model, recipe.student)
    backbone = AutoModel.from_pretrained(sharp_folder, dtype=torch.float64)
    head = torch.nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float64)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(recipe.seed))
        head.bias.zero_()
    discriminator = DiscriminatorTwin(backbone, head, tokenizer, recipe.discriminator)
    batches = Batches(as_examples(rows), recipe.warmup.batch_prompts, recipe.seed, "warmup")

    finished = set()
    for step, (moves, batch, share) in enumerate(STEPS, start=1):
        pairs, surprises = [], []
        for row in (example.row for example in batches(batch)):
            prompt = prompt_ids(tokenizer, row.prompt)
            if moves != "student":
                stream = f"{recipe.seed}\x00warmup/{step}\x00{row.id}"
                samples = draw(student.model, prompt, recipe.warmup.group_size, stream, TEMPERATURE)
                finished |= {sample.finished for sample in samples}
                scores = discriminator.sample_scores(prompt, samples)
                pairs += pair_losses(discriminator.score(prompt, row.responses[0].text, True), scores)
            if moves != "discriminator":
                surprises += teacher_surprises(student.model, tokenizer, row)
        if pairs:
            (sum(pairs) / len(pairs)).backward()
            discriminator.step(DISCRIMINATOR_RATE)
        if surprises:
            (sum(surprises) / len(surprises)).backward()
            student.step(recipe.warmup.learning_rate * share)

    assert finished == {True, False}
    end = run.folder.stage("warmup") / "latest"
    assert_same_weights(student.model, end / "student" / "model.safetensors")
    assert_same_weights(backbone, end / "discriminator" / "model.safetensors")
    assert_same_weights(head, end / "discriminator" / "score_head.safetensors")
    rates = [recipe.warmup.learning_rate * share for _, _, share in STEPS if share]
    assert [row["detail/learning_rate"] for row in logged if "student/loss" in row] == pytest.approx(rates)
    with_discriminator = [row for row in logged if "discriminator/loss" in row]
    assert [row["step"] for row in with_discriminator] == [1, 2, 4, 6, 7, 8]
    assert {row["detail/discriminator_learning_rate"] for row in with_discriminator} == {DISCRIMINATOR_RATE}


def test_the_discriminator_starts_from_the_original_model_not_from_the_fine_tuned_student(
    recipe_file: Path, tiny_model: Path
) -> None:
    settings = ["discriminator.learning_rate=1e-30", "warmup.learning_rate=1e-2"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
    end = run.folder.stage("warmup") / "latest"
    original = AutoModel.from_pretrained(tiny_model).state_dict()
    for name, value in load_file(end / "discriminator" / "model.safetensors").items():
        torch.testing.assert_close(value, original[name], rtol=0, atol=1e-6)
    student = load_file(end / "student" / "model.safetensors")
    assert any(not torch.allclose(value, student[f"model.{name}"]) for name, value in original.items())


def test_a_language_model_that_is_gone_is_not_trained_again_for_a_discriminator_that_began_from_it(
    recipe_file: Path,
) -> None:
    settings = ["discriminator.lm_steps=2", "warmup.max_steps=4", "warmup.save_every=1"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        language_model = run.folder.stage("discriminator-lm")
        shutil.rmtree(language_model)
        warmup(run)
        # So it is where the stage was stopped amid its steps.
        begun = run.folder.read_json("warmup/stage.json")
        run.folder.write_json("warmup/stage.json", {**begun, "done": False})
        drop_checkpoints_after(run.folder.stage("warmup"), begun["total_steps"] - 1)
        warmup(run)
        assert run.folder.is_done("warmup")
    assert not language_model.exists()


def test_the_student_stands_still_in_the_discriminators_own_steps(
    recipe_file: Path, tiny_model: Path
) -> None:
    settings = ["warmup.discriminator_only_steps=3", "warmup.save_every=1", "checkpoints.keep_last=9"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
    stage = run.folder.stage("warmup")
    weights = {
        step: load_file(stage / f"step-{step:06d}" / "student" / "model.safetensors")["model.norm.weight"]
        for step in (1, 3, 4, 7, 8, 9)
    }
    original = load_file(tiny_model / "model.safetensors")["model.norm.weight"]
    assert torch.equal(weights[1], original)
    assert torch.equal(weights[3], original)
    assert not torch.equal(weights[4], original)
    assert torch.equal(weights[7], weights[9])


def test_the_discriminator_rests_for_an_alarm_only_where_the_student_moves(recipe_file: Path) -> None:
    # At this rate it tells every pair from its second step on: an alarm stands before the student moves, and
    # still at the end.
    settings = [
        "alarms.action=skip_discriminator",
        "discriminator.learning_rate=1e-2",
        "discriminator.max_grad_norm=1.0",
        "warmup.discriminator_only_steps=6",
        "warmup.max_steps=2",
    ]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        rows = [row for row in run.folder.rows("metrics.jsonl") if "discriminator/accuracy" in row]
    moved = {row["step"] for row in rows if "discriminator/grad_norm" in row}
    assert moved == {row["step"] for row in rows if "student/loss" not in row}
    assert moved
    assert any("student/loss" in row for row in rows)


def test_fresh_accuracy_is_measured_before_the_update(recipe_file: Path) -> None:
    # A rate that upsets every score at once: measured after, the first loss would not be near log 2.
    settings = ["discriminator.learning_rate=0.5", "warmup.max_steps=1", "warmup.discriminator_only_steps=1"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        first = next(row for row in run.folder.rows("metrics.jsonl") if "discriminator/loss" in row)
    assert abs(first["discriminator/loss"] - 0.693) < 0.1


def test_a_plan_ends_with_the_final_steps() -> None:
    plan = Plan(only=10, joint=5, final=3, discriminator_every=0)
    assert plan.total == 18
    assert [step for step in range(1, 19) if plan.moves(step)[0]] == [11, 12, 13, 14, 15]
    assert [step for step in range(1, 19) if plan.moves(step)[1]] == [*range(1, 11), 16, 17, 18]


def test_no_student_row_is_trained_on_by_imitation(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        warmup(run)
        rows = [json.dumps(row) for row in run.folder.rows("metrics.jsonl") if row["stage"] == "warmup"]
    assert sum('"student/loss"' in row for row in rows) == run.recipe.warmup.max_steps
