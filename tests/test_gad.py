"""The stages against a slow twin: Algorithm 1 written out again, one response at a time, in float64.

Here SeqKD and GAD; warmup is in `test_warmup.py`, which borrows the twin's parts.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


class ReplayTwin:
    """All that was ever scored, and what is drawn from it: two of each step kept, two drawn."""

    def __init__(self, seed: int):
        self.seed = seed
        self.kept: list[tuple[int, Any]] = []

    def some(self, count: int, step: int, purpose: bytes) -> list[int]:
        order = np.random.default_rng([self.seed, *purpose, step]).permutation(count)
        return sorted(order[:2].tolist())

    def drawn(self, step: int, steps: int) -> list[Any]:
        own = [entry for at, entry in self.kept if at >= step - steps]
        return [own[place] for place in self.some(len(own), step, b"drawn")]

    def keep(self, step: int, entries: list[Any]) -> None:
        self.kept += [(step, entries[place]) for place in self.some(len(entries), step, b"kept")]


def advantages(rewards: Sequence[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
    return [(reward - mean) / (deviation + 1e-6) for reward in rewards]


def sample_text(tokenizer: Any, sample: Sample) -> str:
    return tokenizer.decode(sample.tokens[:-1] if sample.finished else sample.tokens)


def distance_from_six(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
    assert all(text.endswith("ok") for text in teachers)
    return [-abs(len(text) - 6 - len(prompt)) for text in responses]


@pytest.fixture
def two_teachers(tmp_path: Path) -> Path:
    """Twenty prompts with an answer of each of two teachers, and a third one's that is not wanted."""
    rows = [
        {
            "id": f"p{n}",
            "prompt": f"say {n}",
            "responses": [f"{n} ok", f"no {n}", f"{n}, ok"],
            "teacher": ["one", "none", "two"],
        }
        for n in range(20)
    ]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gad_is_algorithm_1(recipe_file: Path) -> None:
    assert_gad_is_the_twins(recipe_file, [])


def test_gad_with_every_option_is_what_the_options_say(recipe_file: Path, two_teachers: Path) -> None:
    options = [
        f"data.train={two_teachers}",
        "data.teachers={one = 1.0, two = 0.25}",
        "discriminator.centring=0.3",
        "gad.reward=log_sigmoid",
        'gad.rewards={distance = {function = "unread.py:distance", weight = 0.5}}',
        "gad.replay=2",
        "gad.replay_steps=2",
    ]
    logged = assert_gad_is_the_twins(recipe_file, options)
    for row in logged:
        shares = [value for name, value in row.items() if name.startswith("detail/reward_share/")]
        assert len(shares) == 2
        assert sum(shares) == pytest.approx(1)
        accuracies = [row["detail/accuracy/one"], row["detail/accuracy/two"]]
        assert row["discriminator/accuracy"] == pytest.approx(sum(accuracies) / 2)


def test_a_discriminator_that_moves_at_every_second_step_is_the_reward_at_all(recipe_file: Path) -> None:
    logged = assert_gad_is_the_twins(recipe_file, ["gad.discriminator_every=2", "gad.replay=2"])
    assert [row["detail/discriminator_skipped"] for row in logged] == [1, 0, 1]
    assert ["discriminator/grad_norm" in row for row in logged] == [False, True, False]


def assert_gad_is_the_twins(recipe_file: Path, options: list[str]) -> list[dict[str, Any]]:
    """Compare weights and rates; the metrics of the steps."""
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
        *options,
    ]
    functions = {"distance": distance_from_six}
    with open_run(load_recipe(recipe_file, settings), reward_functions=functions) as run:
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
    group_size, weights = recipe.gad.group_size, recipe.data.teachers
    rates = [recipe.gad.learning_rate * share for share in COSINE]
    replay = ReplayTwin(recipe.seed)

    for step in range(1, STEPS + 1):
        policy_terms, kl_terms, fresh = [], [], []
        for row in (example.row for example in batches(step)):
            prompt = prompt_ids(tokenizer, row.prompt)
            stream = f"{recipe.seed}\x00gad/{step}\x00{row.id}"
            samples = draw(student.model, prompt, group_size, stream, TEMPERATURE)
            fresh.append((row, prompt, samples))
            rewards = [score.item() for score in discriminator.sample_scores(prompt, samples)]
            if recipe.gad.reward == "log_sigmoid":
                rewards = [-math.log1p(math.exp(-reward)) for reward in rewards]
            merits = advantages(rewards)
            for name, reward in recipe.gad.rewards.items():
                texts = [sample_text(tokenizer, sample) for sample in samples]
                own = functions[name](row.prompt, texts, [response.text for response in row.responses])
                merits = [a + reward.weight * b for a, b in zip(merits, advantages(own), strict=True)]
            for sample, merit in zip(samples, merits, strict=True):
                with torch.no_grad():
                    anchors = token_logprobs(reference, prompt, sample.tokens, TEMPERATURE)
                for now, anchor in zip(
                    token_logprobs(student.model, prompt, sample.tokens, TEMPERATURE), anchors, strict=True
                ):
                    policy_terms.append(-merit * torch.exp(now - now.detach()))
                    kl_terms.append(torch.exp(anchor - now) - (anchor - now) - 1)
        (sum(policy_terms) / len(policy_terms) + KL * sum(kl_terms) / len(kl_terms)).backward()
        if step % recipe.gad.discriminator_every == 0:
            earlier = replay.drawn(step, recipe.gad.replay_steps) if recipe.gad.replay else []
            total = norm = squares = count = 0
            for row, prompt, samples in [*fresh, *earlier]:
                scores = discriminator.sample_scores(prompt, samples)
                for response in row.responses:
                    teacher = discriminator.score(prompt, response.text, True)
                    weight = weights.get(response.teacher, 1.0)
                    total += weight * sum(pair_losses(teacher, scores))
                    norm += weight * group_size
                    squares, count = squares + teacher**2, count + 1
                squares, count = squares + sum(score**2 for score in scores), count + group_size
            (total / norm + recipe.discriminator.centring * squares / count).backward()
            discriminator.step(discriminator_rate)
        replay.keep(step, fresh)
        student.step(rates[step - 1])

    end = run.folder.stage("gad") / "latest"
    assert_same_weights(student.model, end / "student" / "model.safetensors")
    assert_same_weights(backbone, end / "discriminator" / "model.safetensors")
    # The mean square moves the head's bias, which pairs do not.
    assert_same_weights(head, end / "discriminator" / "score_head.safetensors")
    steps = [row for row in logged if "student/loss" in row]
    assert [row["detail/learning_rate"] for row in steps] == pytest.approx(rates)
    discriminator_rates = [
        row["detail/discriminator_learning_rate"] for row in steps if "discriminator/loss" in row
    ]
    assert set(discriminator_rates) == {discriminator_rate}
    return steps


def test_without_a_kl_coefficient_no_reference_is_read(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, ["gad.kl_coefficient=0", "gad.max_steps=1"])) as run:
        warmup(run)
        gad(run)
        rows = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "gad" and row["step"] == 1]
    assert "student/kl_nats" not in rows[0]
    assert rows[0]["time/reference_seconds"] < 1e-3
