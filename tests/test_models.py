"""Log-probabilities and entropies against slow loops over the model's own logits, and what opens."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import forgetful_folder, random_groups, sharp_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadfly.engine import Engine
from gadfly.errors import UserError
from gadfly.groups import Branch, Group
from gadfly.logprobs import LogprobReader, log_distribution, masked_mean
from gadfly.models import load_language_model, save_language_model
from gadfly.packing import micro_batches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return sharp_model(tiny_model)


class FixedLogits(nn.Module):
    """A stand-in for a language model: the same logits at every position."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def one_group(prompt: tuple[int, ...], *responses: tuple[int, ...]) -> Group:
    return Group("7", prompt, students=tuple(Branch(response, False, "") for response in responses))


def slow_read(model: PreTrainedModel, groups: list[Group], temperature: float) -> tuple[list, list]:
    """Log-probabilities and entropies, one response at a time, unpadded, from all logits."""
    logprobs, entropies = [], []
    for group in groups:
        for branch in group.branches:
            ids = [*group.prompt_tokens, *branch.tokens]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            row_logprobs, row_entropies = [], []
            for place, token in enumerate(branch.tokens):
                scaled = (logits[len(group.prompt_tokens) + place - 1] / temperature).tolist()
                normaliser = math.log(sum(math.exp(value) for value in scaled))
                row_logprobs.append(scaled[token] - normaliser)
                row_entropies.append(
                    sum(math.exp(value - normaliser) * (normaliser - value) for value in scaled)
                )
            logprobs.append(row_logprobs)
            entropies.append(row_entropies)
    return logprobs, entropies


def assert_rows(values: Tensor, rows: list[list[float]], tolerance: float) -> None:
    """The rows, and nothing but zeros after them."""
    assert len(values) == len(rows)
    for got, expected in zip(values, rows, strict=True):
        assert got[: len(expected)].tolist() == pytest.approx(expected, abs=tolerance)
        assert bool((got[len(expected) :] == 0).all())


@pytest.mark.parametrize("name", ["tiny", "forgetful"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_equal_a_slow_loop_over_all_logits(
    temperature: float, name: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    if name == "forgetful":
        model, _ = load_language_model(str(forgetful_folder(tmp_path)), "float64")
    groups = random_groups(
        0, 5, teachers=1, students=2, lengths=[0, 1, 3, 7], vocabulary=model.config.vocab_size
    )
    assert len({len(group.prompt_tokens) for group in groups}) > 2
    engine = Engine(model, LogprobReader(temperature), micro_batch_tokens=10**6)
    output = engine.forward(groups)
    logprobs, entropies = slow_read(model, groups, temperature)
    assert_rows(output.values, logprobs, 1e-10)
    assert_rows(output.entropy, entropies, 1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_temperature_divides_the_logits_before_they_are_normalised(temperature: float) -> None:
    # Probabilities 1/2, 1/4, 1/4 at temperature 1; 2/3, 1/6, 1/6 at one half.
    model = FixedLogits([math.log(2), 0.0, 0.0])
    (batch,) = micro_batches([one_group((0, 0), (0, 2), (1,))], 100, CPU)
    output = LogprobReader(temperature)(model, batch)
    likely, unlikely = (1 / 2, 1 / 4) if temperature == 1 else (2 / 3, 1 / 6)
    assert_rows(output.values, [[math.log(likely), math.log(unlikely)], [math.log(unlikely)]], 1e-6)
    entropy = -likely * math.log(likely) - 2 * unlikely * math.log(unlikely)
    assert_rows(output.entropy, [[entropy, entropy], [entropy]], 1e-6)


def test_a_token_that_cannot_be_sampled_leaves_the_entropy_finite() -> None:
    (batch,) = micro_batches([one_group((0,), (0,))], 100, CPU)
    output = LogprobReader()(FixedLogits([0.0, 0.0, -math.inf]), batch)
    assert float(output.entropy) == pytest.approx(math.log(2))


def test_responses_without_tokens_have_no_logprobs(model: PreTrainedModel) -> None:
    output = Engine(model, LogprobReader(), micro_batch_tokens=100).forward([one_group((5, 6), (), ())])
    assert output.values.shape == output.entropy.shape == (2, 0)


@pytest.mark.parametrize("budget", [1, 60, 150])
def test_results_do_not_depend_on_the_micro_batch_budget(budget: int, model: PreTrainedModel) -> None:
    groups = random_groups(1, 6)
    whole = Engine(model, LogprobReader(0.8), micro_batch_tokens=10**6).forward(groups)
    pieces = Engine(model, LogprobReader(0.8), micro_batch_tokens=budget).forward(groups)
    assert torch.allclose(pieces.values, whole.values, rtol=0, atol=1e-10)
    assert torch.allclose(pieces.entropy, whole.entropy, rtol=0, atol=1e-10)


def test_results_follow_the_order_of_groups_and_do_not_depend_on_it(model: PreTrainedModel) -> None:
    groups = random_groups(2, 5, teachers=0, students=2)
    engine = Engine(model, LogprobReader(), micro_batch_tokens=60)
    straight = engine.forward(groups).values
    order = [3, 0, 4, 1, 2]
    permuted = engine.forward([groups[index] for index in order]).values
    rows = [2 * index + sample for index in order for sample in range(2)]
    assert torch.allclose(permuted, straight[rows], rtol=0, atol=1e-10)


def test_half_precision_logits_are_normalised_in_single_precision() -> None:
    logits = torch.tensor([[3.0, 1.0, -2.0]])
    distribution = log_distribution(logits.bfloat16(), 0.8)
    assert distribution.dtype == torch.float32
    assert torch.allclose(distribution, log_distribution(logits, 0.8), atol=1e-6)
    assert log_distribution(logits.double(), 0.8).dtype == torch.float64


def test_the_mean_is_over_real_tokens_only() -> None:
    values = torch.tensor([[1.0, 2.0], [6.0, 100.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert masked_mean(values, mask) == 3.0
    assert masked_mean(values, torch.zeros_like(mask)) == 0.0


# Opening and saving


def test_a_model_opens_in_eval_mode_in_the_type_asked_for(tiny_model: Path) -> None:
    for dtype in ("float32", "bfloat16", "float64"):
        model, renderer = load_language_model(str(tiny_model), dtype)
        assert not model.training
        assert model.dtype == getattr(torch, dtype)
        assert renderer.end_ids == {0, 2}


def test_a_saved_student_opens_with_the_same_weights_template_and_ends(
    tiny_model: Path, tmp_path: Path
) -> None:
    model, renderer = load_language_model(str(tiny_model), "float32")
    save_language_model(model, renderer.tokenizer, tmp_path)
    again, renderer_again = load_language_model(str(tmp_path), "float32")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert (renderer_again.end_ids, renderer_again.end_id) == (renderer.end_ids, renderer.end_id)
    assert renderer_again.tokenizer.chat_template == renderer.tokenizer.chat_template


def broken_copy(folder: Path, target: Path, what: str) -> Path:
    shutil.copytree(folder, target)
    weights = target / "model.safetensors"
    if what == "nothing there":
        shutil.rmtree(target)
    elif what == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "config is no JSON":
        (target / "config.json").write_text("{", encoding="utf-8")
    elif what == "tokenizer cut short":
        (target / "tokenizer.json").write_text("{", encoding="utf-8")
    else:
        tensors = load_file(weights)
        name = "model.layers.1.mlp.up_proj.weight"
        if what == "a weight is missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:5].clone()
        save_file(tensors, weights, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "what",
    [
        "nothing there",
        "weights cut short",
        "config is no JSON",
        "tokenizer cut short",
        "a weight is missing",
        "a weight has another shape",
    ],
)
def test_a_folder_that_is_no_whole_model_is_a_user_error_of_one_line(
    what: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = broken_copy(tiny_model, tmp_path / "broken", what)
    with pytest.raises(UserError) as caught:
        load_language_model(str(folder), "float32")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
