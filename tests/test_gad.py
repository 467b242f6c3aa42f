"""The stages against a slow twin: Algorithm 1 written out again, one response at a time, in float64.

Here SeqKD and GAD; warmup is in `test_warmup.py`, which borrows the twin's parts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from gadfly.config import Optimizer
from gadfly.groups import Group
from gadfly.recipe_file import load_recipe
from gadfly.records import Row
from gadfly.samplers import LocalSampler, Request, Sample
from gadfly.stages.examples import Batches, Example
from gadfly.stages.gad import gad
from gadfly.stages.run import open_run
from gadfly.stages.sft import seqkd
from gadfly.stages.warmup import warmup

STEPS = 3
# A cosine over three steps: (1 + cos 0) / 2, (1 + cos 60) / 2, (1 + cos 120) / 2.
COSINE = (1.0, 0.75, 0.25)
END = 2
MAX_TOKENS = 12
KL = 0.05
TEMPERATURE = 0.8


class Twin:
    """A model, and its AdamW in the plain form."""

    def __init__(self, model: torch.nn.Module, settings: Optimizer):
        self.model = model.eval()
        self.max_grad_norm = settings.max_grad_norm
        self.adamw = torch.optim.AdamW(
            model.parameters(), betas=settings.adam_betas, weight_decay=settings.weight_decay, foreach=False
        )

    def step(self, learning_rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()


class DiscriminatorTwin(Twin):
    """Scores one response at a time."""

    def __init__(self, backbone: Any, head: torch.nn.Linear, tokenizer: Any, settings: Optimizer):
        super().__init__(torch.nn.ModuleList([backbone, head]), settings)
        self.backbone, self.head, self.tokenizer = backbone, head, tokenizer

    def score(self, prompt: list[int], text: str, finished: bool) -> torch.Tensor:
        ids = self.tokenizer(text, split_special_tokens=True)["input_ids"]
        response = ids + ([END] if finished else [])
        return self.head(self.backbone(torch.tensor([prompt + response])).last_hidden_state[0, -1])[0]

    def sample_scores(self, prompt: list[int], samples: Sequence[Sample]) -> list[torch.Tensor]:
        bodies = [sample.tokens[:-1] if sample.finished else sample.tokens for sample in samples]
        return [
            self.score(prompt, self.tokenizer.decode(body), sample.finished)
            for body, sample in zip(bodies, samples, strict=True)
        ]


def pair_losses(teacher: torch.Tensor, students: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [-torch.log(torch.sigmoid(teacher - student)) for student in students]


def token_logprobs(
    model: torch.nn.Module, prompt: list[int], response: Sequence[int], temperature: float
) -> list[torch.Tensor]:
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
    return [logits[t].log_softmax(-1)[token] for t, token in enumerate(response)]


def teacher_surprises(model: torch.nn.Module, tokenizer: Any, row: Row) -> list[torch.Tensor]:
    response = [*tokenizer(row.responses[0].text)["input_ids"], END]
    assert len(response) <= MAX_TOKENS
    prompt = prompt_ids(tokenizer, row.prompt)
    return [-logprob for logprob in token_logprobs(model, prompt, response, 1.0)]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def draw(model: Any, prompt: list[int], count: int, stream: str, temperature: float) -> list[Sample]:
    sampler = LocalSampler(model, frozenset({END, 0}))
    request = Request(tuple(prompt), count, stream)
    return sampler.sample([request], temperature=temperature, max_response_tokens=MAX_TOKENS)[0]


def as_examples(rows: Sequence[Row]) -> list[Example]:
    return [Example(row, Group(row.id, ())) for row in rows]


def assert_same_weights(model: torch.nn.Module, file: Path) -> None:
    """To a relative 1e-6: the model norms in single precision whatever its weights are."""
    own = dict(model.named_parameters())
    for name, value in load_file(file).items():
        # The head's bias has no gradient but rounding: pairs differ by none of it.
        assert (own[name] - value).norm() <= 1e-6 * value.norm() + 1e-11, name


def test_seqkd_is_the_token_mean_of_the_teachers_surprise(recipe_file: Path) -> None:
    settings = ["student.dtype=float64", f"seqkd.max_steps={STEPS}", "data.valid_share=0"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        seqkd(run)
        recipe, rows = run.recipe, run.data.train
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.model)
    model = AutoModelForCausalLM.from_pretrained(recipe.student.model, dtype=torch.float64)
    twin = Twin(model, recipe.student)
    batches = Batches(as_examples(rows), recipe.seqkd.batch_prompts, recipe.seed, "seqkd")
    for step in range(1, STEPS + 1):
        surprises = []
        for row in (example.row for example in batches(step)):
            surprises += teacher_surprises(model, tokenizer, row)
        (sum(surprises) / len(surprises)).backward()
        twin.step(recipe.seqkd.learning_rate)
    assert_same_weights(model, run.folder.stage("seqkd") / "latest" / "student" / "model.safetensors")


def test_gad_is_algorithm_1(recipe_file: Path) -> None:
    discriminator_rate = 2e-3
    settings = [
        "student.dtype=float64",
        "discriminator.adam_betas=[0.8, 0.9]",
        f"gad.max_steps={STEPS}",
        f"gad.kl_coefficient={KL}",
        "gad.learning_rate_schedule=cosine",
        f"gad.discriminator_learning_rate={discriminator_rate}",
        f"sampling.temperature={TEMPERATURE}",
        "engine.micro_batch_tokens=200",
    ]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        gad(run)
        recipe, rows = run.recipe, run.data.train
        logged = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "gad"]
    start = run.folder.stage("warmup") / "latest"
    tokenizer = AutoTokenizer.from_pretrained(start / "student")
    student = Twin(
        AutoModelForCausalLM.from_pretrained(start / "student", dtype=torch.float64), recipe.student
    )
    reference = AutoModelForCausalLM.from_pretrained(start / "student", dtype=torch.float64).eval()
    backbone = AutoModel.from_pretrained(start / "discriminator", dtype=torch.float64)
    head = torch.nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float64)
    head.load_state_dict(load_file(start / "discriminator" / "score_head.safetensors"))
    discriminator = DiscriminatorTwin(backbone, head, tokenizer, recipe.discriminator)
    batches = Batches(as_examples(rows), recipe.gad.batch_prompts, recipe.seed, "gad")
    group_size = recipe.gad.group_size
    rates = [recipe.gad.learning_rate * share for share in COSINE]

    for step in range(1, STEPS + 1):
        pairs, policy_terms, kl_terms = [], [], []
        for row in (example.row for example in batches(step)):
            prompt = prompt_ids(tokenizer, row.prompt)
            stream = f"{recipe.seed}\x00gad/{step}\x00{row.id}"
            samples = draw(student.model, prompt, group_size, stream, TEMPERATURE)
            scores = discriminator.sample_scores(prompt, samples)
            pairs += pair_losses(discriminator.score(prompt, row.responses[0].text, True), scores)
            rewards = [score.item() for score in scores]
            mean = sum(rewards) / group_size
            deviation = (sum((reward - mean) ** 2 for reward in rewards) / (group_size - 1)) ** 0.5
            for sample, reward in zip(samples, rewards, strict=True):
                advantage = (reward - mean) / (deviation + 1e-6)
                with torch.no_grad():
                    anchors = token_logprobs(reference, prompt, sample.tokens, TEMPERATURE)
                for now, anchor in zip(
                    token_logprobs(student.model, prompt, sample.tokens, TEMPERATURE), anchors, strict=True
                ):
                    policy_terms.append(-advantage * torch.exp(now - now.detach()))
                    kl_terms.append(torch.exp(anchor - now) - (anchor - now) - 1)
        (sum(pairs) / len(pairs)).backward()
        (sum(policy_terms) / len(policy_terms) + KL * sum(kl_terms) / len(kl_terms)).backward()
        discriminator.step(discriminator_rate)
        student.step(rates[step - 1])

    end = run.folder.stage("gad") / "latest"
    assert_same_weights(student.model, end / "student" / "model.safetensors")
    assert_same_weights(backbone, end / "discriminator" / "model.safetensors")
    assert_same_weights(head, end / "discriminator" / "score_head.safetensors")
    assert [row["detail/learning_rate"] for row in logged if "student/loss" in row] == pytest.approx(rates)
    assert {row["detail/discriminator_learning_rate"] for row in logged if "student/loss" in row} == {
        discriminator_rate
    }


def test_without_a_kl_coefficient_no_reference_is_read(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, ["gad.kl_coefficient=0", "gad.max_steps=1"])) as run:
        warmup(run)
        gad(run)
        rows = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "gad" and row["step"] == 1]
    assert "student/kl_nats" not in rows[0]
    assert rows[0]["time/reference_seconds"] < 1e-3
