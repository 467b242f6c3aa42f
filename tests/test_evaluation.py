"""Figures of held-out prompts against a slow twin, and that measuring changes nothing of what is measured."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from side_by_side import side_by_side
from test_gad import draw, prompt_ids
from transformers import AutoModelForCausalLM

from gadfly.analysis.surface_features import Written, surface_accuracy
from gadfly.analysis.tell import Pair, tell_accuracy
from gadfly.checkpoint import latest_checkpoint
from gadfly.discriminator import load_discriminator
from gadfly.distributed.processes import Processes
from gadfly.groups import Branch, Group
from gadfly.metrics import without_time
from gadfly.packing import micro_batches
from gadfly.recipe_file import load_recipe
from gadfly.records import Row
from gadfly.run_folder import RunFolder
from gadfly.samplers import Sample
from gadfly.stages.adversaries import open_adversaries
from gadfly.stages.evaluation import answer_metrics
from gadfly.stages.gad import gad
from gadfly.stages.held_out import perturbation_shares
from gadfly.stages.perturbations import PERTURBATIONS
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup

PROMPTS = 24
# Texts of the random model hold broken UTF-8, white space and marks; the teacher's end in a mark.
RECIPE = """
name = "tiny"
[data]
train = "{data}"
valid_share = 0.7
[student]
model = "{model}"
dtype = "float64"
max_grad_norm = 1.0
[discriminator]
learning_rate = 1e-3
[sampling]
max_response_tokens = 12
temperature = 0.8
[warmup]
learning_rate = 1e-3
batch_prompts = 8
group_size = 2
max_steps = 2
discriminator_only_steps = 1
save_every = 2
evaluate_every = 2
[gad]
learning_rate = 1e-3
discriminator_learning_rate = 3e-3
batch_prompts = 4
group_size = 4
max_steps = 6
save_every = 2
evaluate_every = 3
[evaluation]
prompts = {prompts}
[checkpoints]
keep_last = 9
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Sixty prompts whose answers end in a full stop, more than half of them held out."""
    folder = tmp_path_factory.mktemp("held-out")
    records = [{"id": f"q{n}", "prompt": f"say {n}", "response": f"{n} is ok."} for n in range(60)]
    data = folder / "many.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(data=data, model=tiny_model, prompts=PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(recipe: Path) -> Path:
    """The folder of a run of both adversarial stages."""
    return trained_in(recipe, recipe.parent / "done")


def trained_in(recipe: Path, folder: Path, *overrides: str, processes: Processes | None = None) -> Path:
    with open_run(load_recipe(recipe, [f"run_folder={folder}", *overrides]), processes) as run:
        warmup(run)
        gad(run)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [without_time(row) for row in RunFolder(str(folder)).rows("metrics.jsonl")]


def evaluations(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if row["stage"] == stage and "evaluation/rouge_l" in row]


class Scorer:
    """A saved discriminator that scores one text at a time."""

    def __init__(self, folder: Path):
        self.model, self.renderer = load_discriminator(folder, "float64")

    def __call__(self, row: Row, text: str, finished: bool) -> float:
        tokens = tuple(self.renderer.response_tokens(text, finished))
        group = Group("", tuple(self.renderer.prompt_tokens(row.messages)), (Branch(tokens, finished, text),))
        with torch.no_grad():
            return float(self.model(micro_batches([group], 1, torch.device("cpu"))[0]))


def read(scorer: Scorer, sample: Sample) -> tuple[str, bool]:
    return scorer.renderer.response_text(sample.tokens), sample.finished


def test_they_are_those_of_a_slow_twin(recipe: Path, done: Path) -> None:
    with open_run(load_recipe(recipe, [f"run_folder={done}"])) as run:
        seed, held_out = run.recipe.seed, run.data.valid[:PROMPTS]
    found, stage = evaluations(done, "gad")[-1], done / "gad"
    student = AutoModelForCausalLM.from_pretrained(stage / "latest" / "student", dtype=torch.float64).eval()
    scorer = Scorer(stage / "latest" / "discriminator")
    fresh, greedy = [], []
    for row in held_out:
        prompt = prompt_ids(scorer.renderer.tokenizer, row.prompt)
        stream = f"{seed}\x00held-out\x00{row.id}"
        fresh.append(read(scorer, draw(student, prompt, 1, stream, 0.8)[0]))
        greedy.append(read(scorer, draw(student, prompt, 1, "", 0.0)[0]))
    teacher = [(row.responses[0].text, True) for row in held_out]

    def gaps(of: Scorer) -> list[float]:
        return [
            of(row, *own) - of(row, *other) for row, own, other in zip(held_out, teacher, fresh, strict=True)
        ]

    live = gaps(scorer)
    assert found["detail/held_out_accuracy"] == sum((gap > 0) + 0.5 * (gap == 0) for gap in live) / PROMPTS
    margin = sum(map(abs, live)) / PROMPTS
    shares = {}
    for name, change in PERTURBATIONS.items():
        moved = []
        for row, (text, finished) in zip(held_out * 2, teacher + fresh, strict=True):
            changed = change(text)
            # A cap of 12 tokens, one a byte.
            length = len(scorer.renderer.response_tokens(changed, finished))
            if changed != text and length <= max(12, len(scorer.renderer.response_tokens(text, finished))):
                moved.append(abs(scorer(row, changed, finished) - scorer(row, text, finished)))
        if len(moved) >= 0.1 * 2 * PROMPTS:
            shares[name] = sum(moved) / len(moved) / margin
    assert len(shares) >= 2
    for name in PERTURBATIONS:
        assert found.get(f"detail/perturbation_share/{name}") == pytest.approx(shares.get(name), rel=1e-6)
    assert found["detail/perturbation_share"] == pytest.approx(max(shares.values()), rel=1e-6)
    for name, place in {
        "warmup": done / "warmup" / "latest",
        "gad-000004": stage / "step-000004",
    }.items():
        earlier = gaps(Scorer(place / "discriminator"))
        assert found[f"detail/snapshot_gap/{name}"] == pytest.approx(sum(earlier) / PROMPTS, rel=1e-6)
    assert len([name for name in found if name.startswith("detail/snapshot_gap/")]) == 2
    pairs = [(Written(*own), Written(*other)) for own, other in zip(teacher, fresh, strict=True)]
    assert found["detail/surface_accuracy"] == surface_accuracy(pairs).accuracy.value
    answered = [
        Pair(row.prompt, own, answer)
        for row, (own, _), (answer, _) in zip(held_out, teacher, greedy, strict=True)
    ]
    assert found["evaluation/tell_accuracy"] == tell_accuracy(answered).value
    samples = RunFolder(str(done)).rows("samples.jsonl")
    shown = [row for row in samples if (row["kind"], row["stage"]) == ("evaluation", "gad")][-4:]
    for row, own, other, kept in zip(held_out, teacher, greedy, shown, strict=False):
        assert kept["score"] == pytest.approx(scorer(row, *other), rel=1e-6)
        assert kept["teacher_score"] == pytest.approx(scorer(row, *own), rel=1e-6)


def test_at_the_start_of_gad_warmups_last_discriminator_is_the_live_one(done: Path) -> None:
    first, *later = evaluations(done, "gad")
    names = [[name for name in row if name.startswith("detail/snapshot_gap/")] for row in (first, *later)]
    assert names[0] == ["detail/snapshot_gap/warmup"]
    # Evaluations at steps 3 and 6, before the checkpoints of those steps.
    assert names[1] == ["detail/snapshot_gap/warmup", "detail/snapshot_gap/gad-000002"]
    assert names[2] == ["detail/snapshot_gap/warmup", "detail/snapshot_gap/gad-000004"]


def test_classifiers_are_left_out_where_there_are_too_few_prompts(recipe_file: Path, tmp_path: Path) -> None:
    with open_run(load_recipe(recipe_file, ["warmup.max_steps=1", f"run_folder={tmp_path}"])) as run:
        warmup(run)
    found = evaluations(tmp_path, "warmup")
    assert found
    for row in found:
        assert "evaluation/tell_accuracy" not in row
        assert "detail/surface_accuracy" not in row
        assert 0 <= row["detail/held_out_accuracy"] <= 1


def test_prompts_that_differ_in_nothing_are_too_few_to_be_told_apart() -> None:
    answers = [Branch((5,), True, f"{n}") for n in range(40)]
    references = [["a"]] * 40
    few = answer_metrics(["one", "two"] * 20, references, answers)
    many = answer_metrics([f"prompt {n}" for n in range(40)], references, answers)
    assert "evaluation/tell_accuracy" not in few
    assert many.pop("evaluation/tell_accuracy") == 1
    assert few == many


def test_equal_answers_cannot_be_told_apart() -> None:
    texts = [f"{n} it is" for n in range(40)]
    answers = [Branch((5,), True, text) for text in texts]
    metrics = answer_metrics([f"prompt {n}" for n in range(40)], [[text] for text in texts], answers)
    assert metrics["evaluation/tell_accuracy"] == 0.5


def perturbed(*places: Sequence[int]) -> Group:
    """A pair; for each role which of the three changes make other tokens of it."""
    roles = []
    for changed in places:
        same = Branch((1,), True, "")
        variants = [replace(same, tokens=(2,)) if place in changed else same for place in (1, 2, 3)]
        roles.append((same, same, *variants))
    return Group("p", (1,), *roles)


def test_a_change_counts_by_the_answers_it_changes_and_against_the_margin() -> None:
    # White space moves the two answers that have some by 1 and 3; the margins are 4 and 12: 2 / 8.
    scores = torch.tensor([[[0.0, 1, 0, 0], [5, 5, 7, 5]], [[2, 2, 2, 2], [9, 6, 9, 9]]], dtype=torch.float64)
    pairs = [perturbed([1], [2]), perturbed([], [1])]
    shares = perturbation_shares(scores, pairs, torch.tensor([4.0, -12.0]))
    assert shares == {
        "detail/perturbation_share": 0.25,
        "detail/perturbation_share/white_space": 0.25,
        # The one answer with a mark at its end moves by 2.
        "detail/perturbation_share/punctuation": 0.25,
    }


def test_without_a_margin_or_a_change_there_is_no_share_of_it() -> None:
    scores = torch.zeros(1, 2, 4, dtype=torch.float64)
    assert perturbation_shares(scores, [perturbed([1], [2])], torch.zeros(1)) == {}
    assert perturbation_shares(scores, [perturbed([], [])], torch.ones(1)) == {}


def test_a_change_that_few_answers_are_open_to_is_left_out() -> None:
    scores = torch.ones(11, 2, 4, dtype=torch.float64)
    two, three = ([perturbed([1], [])] * count + [perturbed([], [])] * (11 - count) for count in (2, 3))
    assert perturbation_shares(scores, two, torch.ones(11)) == {}
    assert perturbation_shares(scores, three, torch.ones(11))["detail/perturbation_share"] == 0


def everything(players: Any) -> dict[str, Any]:
    """All that a step works with, copied."""
    held: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1]}
    for role in (players.student, players.discriminator):
        for name, value in [*role.engine.model.state_dict().items(), *role.engine.optimizer_state().items()]:
            held[f"{type(role).__name__}.{name}"] = value.clone()
        grads = [weight.grad for weight in role.engine.model.parameters()]
        held[f"{type(role).__name__} gradients"] = torch.tensor([grad is not None for grad in grads])
    return held


def test_an_evaluation_leaves_weights_optimisers_and_random_numbers_as_they_were(
    recipe: Path, done: Path
) -> None:
    with open_run(load_recipe(recipe, [f"run_folder={done}"])) as run:
        start = latest_checkpoint(run.folder.stage("warmup"))
        players = open_adversaries(run, "gad", run.recipe.gad, temperature=0.8, start=start)
        evaluate = players._evaluation()
        assert evaluate is not None
        before = everything(players)
        first, _ = evaluate()
        after = everything(players)
        again, _ = evaluate()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(value, after[name]), name
    assert first == again


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint of gad, those of the optimisers included."""
    last = (folder / "gad" / "latest").resolve()
    return {
        f"{file.relative_to(last)}.{name}": value
        for file in sorted(last.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of steps, without what is measured only at steps that are evaluated."""
    found = [row for row in rows(folder) if "evaluation/rouge_l" not in row]
    return [
        {name: value for name, value in row.items() if name != "detail/rouge_rank_correlation"}
        for row in found
    ]


def test_what_is_evaluated_after_every_step_is_trained_as_if_it_never_were(
    recipe: Path, teacher_file: Path, tmp_path: Path
) -> None:
    alone = trained_in(recipe, tmp_path / "never", "data.valid_share=0")
    often = ["warmup.evaluate_every=1", "gad.evaluate_every=1", f"data.valid={teacher_file}"]
    watched = trained_in(recipe, tmp_path / "often", "data.valid_share=0", *often)
    assert len(evaluations(watched, "gad")) == 7
    assert evaluations(alone, "gad") == []
    expected, found = weights(alone), weights(watched)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert steps(watched) == steps(alone)


def test_a_resumed_stage_measures_what_an_undisturbed_one_does(
    recipe: Path, done: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(done, folder, symlinks=True)
    shutil.rmtree(folder / "gad" / "step-000006")
    stage = json.loads((folder / "gad" / "stage.json").read_text(encoding="utf-8"))
    (folder / "gad" / "stage.json").write_text(json.dumps({**stage, "done": False}), encoding="utf-8")
    assert rows(trained_in(recipe, folder)) == rows(done)


def test_a_stage_that_goes_on_with_other_software_says_so(
    recipe: Path, done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(done, folder, symlinks=True)
    shutil.rmtree(folder / "gad" / "step-000006")
    file = folder / "gad" / "stage.json"
    stage = json.loads(file.read_text(encoding="utf-8"))
    own = stage["environment"]["packages"]["torch"]
    stage["environment"]["packages"]["torch"] = "1.0"
    file.write_text(json.dumps({**stage, "done": False}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="gadfly"):
        trained_in(recipe, folder)
    told = f"gad: begun with other software (packages.torch = '1.0', now {own!r}); its numbers may differ"
    assert told in caplog.messages


def train(processes: Processes, recipe: Path, folder: Path) -> None:
    trained_in(recipe, folder, processes=processes)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(recipe: Path, done: Path, tmp_path: Path) -> None:
    side_by_side(train, recipe, tmp_path / "both")
    one, two = rows(done), rows(tmp_path / "both")
    assert len([row for row in one if "detail/snapshot_gap/warmup" in row]) == 3
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for row, other in zip(one, two, strict=True):
        for name, value in row.items():
            expected = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
            assert other[name] == expected, (row["stage"], row["step"], name)
