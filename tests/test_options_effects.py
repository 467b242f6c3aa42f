"""Each option against an instability that is planted for it, beside what happens without the option."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gad import teacher_surprises
from transformers import AutoModelForCausalLM, AutoTokenizer

from gadfly.config import DiscriminatorConfig
from gadfly.discriminator import new_discriminator, read_scores
from gadfly.engine import Engine
from gadfly.groups import Branch, Group
from gadfly.losses import bounded_reward, group_advantages
from gadfly.recipe_file import load_recipe
from gadfly.records import Message, Row, TeacherResponse
from gadfly.replay import Replay
from gadfly.stages.diagnostics import discriminator_metrics
from gadfly.stages.discriminator_step import DiscriminatorTrainer, UpdateSchedule
from gadfly.stages.gad import gad
from gadfly.stages.run import open_run
from gadfly.stages.sft import seqkd
from gadfly.stages.warmup import warmup


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, teacher_file: Path) -> Path:
    """The checkpoint that every arm starts from."""
    folder = tmp_path_factory.mktemp("warmed-up")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""
name = "warmed-up"
[data]
train = "{teacher_file}"
valid_share = 0
[student]
model = "{tiny_model}"
max_grad_norm = 1.0
[discriminator]
learning_rate = 1e-3
[sampling]
max_response_tokens = 12
[warmup]
learning_rate = 1e-3
batch_prompts = 8
group_size = 2
max_steps = 4
discriminator_only_steps = 4
""",
        encoding="utf-8",
    )
    with open_run(load_recipe(recipe)) as run:
        warmup(run)
    return (run.folder.stage("warmup") / "latest").resolve()


def few_letters(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
    return [-float(len(text)) for text in responses]


def steps_of_gad(recipe_file: Path, start: Path, *settings: str) -> list[dict[str, Any]]:
    folder = recipe_file.parent / "-".join(["arm", *(str(len(text)) for text in settings)])
    own = [f"run_folder={folder}", f"gad.start_from={start}", "data.valid_share=0", "gad.save_every=100"]
    recipe = load_recipe(recipe_file, [*own, *settings])
    with open_run(recipe, reward_functions={"few": few_letters}) as run:
        gad(run)
        return [row for row in run.folder.rows("metrics.jsonl") if "student/loss" in row]


def last_mean(steps: list[dict[str, Any]], name: str) -> float:
    return sum(step[name] for step in steps[-5:]) / 5


# A student that stands still, and a discriminator that tells it at once and could go on for ever.
RUNAWAY = ("gad.learning_rate=1e-12", "gad.discriminator_learning_rate=3e-3", "gad.max_steps=20")


@pytest.mark.parametrize(
    "option",
    ["gad.discriminator_rests_above=0.7", "gad.discriminator_every=10", "discriminator.centring=0.1"],
)
def test_a_runaway_discriminator_is_held_back(recipe_file: Path, warmed_up: Path, option: str) -> None:
    free = steps_of_gad(recipe_file, warmed_up, *RUNAWAY)
    held = steps_of_gad(recipe_file, warmed_up, *RUNAWAY, option)
    assert last_mean(free, "discriminator/score_gap") > 1.5 * free[0]["discriminator/score_gap"]
    assert last_mean(held, "discriminator/score_gap") < 0.6 * last_mean(free, "discriminator/score_gap")


def test_one_absurd_score_leaves_the_others_their_advantages_only_if_it_is_bounded() -> None:
    scores = torch.tensor([[40.0, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.3]])

    def spread(rewards: torch.Tensor) -> float:
        others = group_advantages(rewards)[0, 1:]
        return float(others.max() - others.min())

    assert spread(scores) < 0.05
    assert spread(bounded_reward(scores)) > 0.5


def test_beyond_a_high_score_a_bounded_reward_asks_for_no_more() -> None:
    assert group_advantages(bounded_reward(torch.tensor([[30.0, 40.0]]))).abs().max() < 1e-6
    assert group_advantages(torch.tensor([[30.0, 40.0]])).abs().max() > 0.7


@pytest.mark.slow
def test_replay_keeps_what_a_discriminator_had_learnt_when_its_student_moves_on(tiny_model: Path) -> None:
    def gap_on_the_first_fault(num_replayed: int, seed: int) -> float:
        """On average over thirty steps on the student's second fault, after thirty on its first."""
        model, renderer = new_discriminator(str(tiny_model), "float32", seed=seed)
        config = DiscriminatorConfig(max_grad_norm=1.0)
        engine = Engine(model, read_scores, micro_batch_tokens=4096, optimizer=config)
        trainer = DiscriminatorTrainer(
            engine, config, [], UpdateSchedule(), Replay(num_replayed, steps=100, seed=0)
        )
        prompt = tuple(renderer.prompt_tokens([Message("user", "say")]))

        def group(right: str, wrong: str) -> Group:
            own, other = (
                Branch(tuple(renderer.response_tokens(text, True)), True, text) for text in (right, wrong)
            )
            return Group("", prompt, (own,), (other,))

        # The teacher may say a, if b is better; when the student has come to say c, only a is beside it.
        first, second = group("b", "a"), group("a", "c")
        gaps = []
        for step in range(1, 61):
            trainer(step, [first if step <= 30 else second], rests=False).step(5e-4)
            if step > 30 and step % 5 == 0:
                metrics = discriminator_metrics(engine.forward([first]), [first])
                gaps.append(metrics["discriminator/score_gap"])
        return sum(gaps) / len(gaps)

    forgetful, reminded = (
        sum(gap_on_the_first_fault(num_replayed, seed) for seed in range(3)) / 3 for num_replayed in (0, 3)
    )
    assert reminded > forgetful + 0.7


@pytest.mark.slow
def test_an_extra_reward_is_followed_where_the_discriminator_says_nothing(
    recipe_file: Path, warmed_up: Path
) -> None:
    # It learns nothing more, and what it says of the random student is noise to the length.
    settings = ("gad.learning_rate=2e-2", "gad.discriminator_learning_rate=1e-12", "gad.max_steps=20")
    reward = 'gad.rewards={few = {function = "few.py:few", weight = 3.0}}'
    without = steps_of_gad(recipe_file, warmed_up, *settings)
    steps = steps_of_gad(recipe_file, warmed_up, *settings, reward)
    assert last_mean(steps, "rollout/response_tokens") < 0.7 * last_mean(without, "rollout/response_tokens")
    assert steps[0]["detail/reward_share/few"] > 0.5


def test_the_student_takes_after_the_teacher_that_counts_more(recipe_file: Path, tiny_model: Path) -> None:
    data = recipe_file.with_name("two.jsonl")
    rows = [
        {"prompt": f"say {n}", "responses": ["right", "wrong"], "teacher": ["good", "bad"]} for n in range(16)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def preference(teachers: str) -> float:
        """How many nats likelier the good teacher's answer is."""
        folder = recipe_file.with_name(f"run-{len(teachers)}")
        settings = [f"data.train={data}", "data.valid_share=0", "seqkd.max_steps=20", f"run_folder={folder}"]
        with open_run(load_recipe(recipe_file, [*settings, f"data.teachers={teachers}"])) as run:
            seqkd(run)
        model = AutoModelForCausalLM.from_pretrained(run.folder.stage("seqkd") / "latest" / "student")
        surprises = [
            float(sum(teacher_surprises(model, tokenizer, row)).detach())
            for text in ("right", "wrong")
            for row in [Row("", (Message("user", "say 3"),), (TeacherResponse(text),))]
        ]
        return surprises[1] - surprises[0]

    alike, weighted, alone = map(preference, ("{}", "{good = 1.0, bad = 0.1}", "{good = 1.0}"))
    assert abs(alike) < weighted < alone
    assert weighted > 1
