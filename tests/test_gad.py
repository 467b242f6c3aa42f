"""The stages against a slow twin: Algorithm 1 written out again, one response at a time, in float64."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from gadfly.groups import Group
from gadfly.recipe_file import load_recipe
from gadfly.records import Row
from gadfly.samplers import LocalSampler, Request
from gadfly.stages.examples import Batches, Example
from gadfly.stages.gad import gad
from gadfly.stages.run import open_run
from gadfly.stages.sft import seqkd
from gadfly.stages.warmup import Plan, warmup

STEPS = 3
END = 2
KL = 0.05
TEMPERATURE = 0.8


class Twin:
    """A model, its AdamW in the plain form, and per-response reading."""

    def __init__(self, model: torch.nn.Module, learning_rate: float, max_grad_norm: float):
        self.model = model.eval()
        self.max_grad_norm = max_grad_norm
        self.adamw = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, foreach=False)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad()


def token_logprobs(model: torch.nn.Module, prompt: list[int], response: list[int], temperature: float):
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return [logits[t].log_softmax(-1)[token] for t, token in enumerate(response)]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def as_examples(rows: Sequence[Row]) -> list[Example]:
    return [Example(row, Group(row.id, ())) for row in rows]


def assert_same_weights(model: torch.nn.Module, file: Path) -> None:
    saved = load_file(file)
    own = dict(model.named_parameters())
    for name, value in saved.items():
        torch.testing.assert_close(own[name], value, rtol=1e-9, atol=1e-11)


def test_seqkd_is_the_token_mean_of_the_teachers_surprise(recipe_file: Path) -> None:
    settings = ["student.dtype=float64", f"seqkd.max_steps={STEPS}", "data.valid_share=0"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        seqkd(run)
        recipe, rows = run.recipe, run.data.train
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.model)
    model = AutoModelForCausalLM.from_pretrained(recipe.student.model, dtype=torch.float64)
    twin = Twin(model, recipe.seqkd.learning_rate, recipe.student.max_grad_norm)
    batches = Batches(as_examples(rows), recipe.seqkd.batch_prompts, recipe.seed, "seqkd")
    for step in range(1, STEPS + 1):
        surprises = []
        for row in (example.row for example in batches(step)):
            response = [*tokenizer(row.responses[0].text)["input_ids"], END][:12]
            prompt = prompt_ids(tokenizer, row.prompt)
            surprises += [-logprob for logprob in token_logprobs(model, prompt, response, 1.0)]
        (sum(surprises) / len(surprises)).backward()
        twin.step()
    assert_same_weights(model, run.folder.stage("seqkd") / "latest" / "student" / "model.safetensors")


def test_gad_is_algorithm_1(recipe_file: Path) -> None:
    settings = [
        "student.dtype=float64",
        f"gad.max_steps={STEPS}",
        f"gad.kl_coefficient={KL}",
        f"sampling.temperature={TEMPERATURE}",
        "engine.micro_batch_tokens=200",
    ]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        gad(run)
        recipe, rows = run.recipe, run.data.train
    start = run.folder.stage("warmup") / "latest"
    tokenizer = AutoTokenizer.from_pretrained(start / "student")
    student = Twin(
        AutoModelForCausalLM.from_pretrained(start / "student", dtype=torch.float64),
        recipe.gad.learning_rate,
        recipe.student.max_grad_norm,
    )
    reference = AutoModelForCausalLM.from_pretrained(start / "student", dtype=torch.float64).eval()
    backbone = AutoModel.from_pretrained(start / "discriminator", dtype=torch.float64)
    head = torch.nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float64)
    head.load_state_dict(load_file(start / "discriminator" / "score_head.safetensors"))
    discriminator = Twin(
        torch.nn.ModuleList([backbone, head]),
        recipe.discriminator.learning_rate,
        recipe.discriminator.max_grad_norm,
    )
    batches = Batches(as_examples(rows), recipe.gad.batch_prompts, recipe.seed, "gad")
    group_size = recipe.gad.group_size

    def score(prompt: list[int], text: str, finished: bool) -> torch.Tensor:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        response = ids + ([END] if finished else [])
        return head(backbone(torch.tensor([prompt + response])).last_hidden_state[0, -1])[0]

    for step in range(1, STEPS + 1):
        pair_losses, policy_terms, kl_terms = [], [], []
        for row in (example.row for example in batches(step)):
            prompt = prompt_ids(tokenizer, row.prompt)
            sampler = LocalSampler(student.model, frozenset({END, 0}))  # type: ignore[arg-type]
            request = Request(tuple(prompt), group_size, f"{recipe.seed}\x00gad/{step}\x00{row.id}")
            samples = sampler.sample([request], temperature=TEMPERATURE, max_response_tokens=12)[0]
            teacher = [*tokenizer(row.responses[0].text)["input_ids"], END]
            assert len(teacher) <= 12
            teacher_score = score(prompt, row.responses[0].text, True)
            rewards = []
            for sample in samples:
                body = sample.tokens[:-1] if sample.finished else sample.tokens
                sample_score = score(prompt, tokenizer.decode(body), sample.finished)
                pair_losses.append(-torch.log(torch.sigmoid(teacher_score - sample_score)))
                rewards.append(sample_score.item())
            mean = sum(rewards) / group_size
            deviation = (sum((reward - mean) ** 2 for reward in rewards) / (group_size - 1)) ** 0.5
            for sample, reward in zip(samples, rewards, strict=True):
                advantage = (reward - mean) / (deviation + 1e-6)
                tokens = list(sample.tokens)
                with torch.no_grad():
                    anchors = token_logprobs(reference, prompt, tokens, TEMPERATURE)
                for now, anchor in zip(
                    token_logprobs(student.model, prompt, tokens, TEMPERATURE), anchors, strict=True
                ):
                    policy_terms.append(-advantage * torch.exp(now - now.detach()))
                    kl_terms.append(torch.exp(anchor - now) - (anchor - now) - 1)
        (sum(pair_losses) / len(pair_losses)).backward()
        (sum(policy_terms) / len(policy_terms) + KL * sum(kl_terms) / len(kl_terms)).backward()
        discriminator.step()
        student.step()

    end = run.folder.stage("gad") / "latest"
    assert_same_weights(student.model, end / "student" / "model.safetensors")
    assert_same_weights(backbone, end / "discriminator" / "model.safetensors")
    assert_same_weights(head, end / "discriminator" / "score_head.safetensors")


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


def test_without_a_kl_coefficient_no_reference_is_read(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, ["gad.kl_coefficient=0", "gad.max_steps=1"])) as run:
        warmup(run)
        gad(run)
        rows = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "gad" and row["step"] == 1]
    assert "student/kl_nats" not in rows[0]
    assert rows[0]["time/reference_seconds"] < 1e-3


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
