"""A prompt computed once for all its branches gives what plain padded batches give."""

import random
from copy import deepcopy

import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gadfly.attention import open_attention
from gadfly.groups import Branch, Group
from gadfly.logprobs import LogprobReader
from gadfly.packing import micro_batches
from gadfly.shared_prompt import SharedPrompts

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


NARROW = {**SIZES, "head_dim": 8}
FAMILIES: dict[str, tuple[type, object]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    # As SmolLM2: a Llama whose head is its embedding.
    "smollm2": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**NARROW)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**NARROW, sliding_window=5, layer_types=LAYERS)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    ),
}


def build(family: str) -> PreTrainedModel:
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    return kind(deepcopy(config)).double().eval()


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    """Prompts and branches of all lengths from 1; one branch is empty."""
    rng = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(length))

    def branch(length: int) -> Branch:
        return Branch(tokens(length), True, "")

    return [
        Group(
            str(number),
            tokens(rng.randint(1, 30)),
            teachers=(branch(rng.randint(1, 20)),),
            students=tuple(branch(rng.randint(0 if number == 0 else 1, 25)) for _ in range(3)),
        )
        for number in range(6)
    ]


def logprobs_and_gradients(
    model: PreTrainedModel, groups: list[Group], *, shares_prompts: bool, max_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities and entropies of every response token in row order, and a loss's gradients."""
    model.zero_grad()
    found: dict[int, torch.Tensor] = {}
    for batch in micro_batches(groups, max_tokens, torch.device("cpu"), shares_prompts=shares_prompts):
        read = LogprobReader(0.8)(model, batch)
        (read.values**2).sum().backward()
        for row, values, entropy, length in zip(
            batch.rows.tolist(), read.values, read.entropy, batch.response_lengths.tolist(), strict=True
        ):
            found[row] = torch.stack([values[:length], entropy[:length]]).detach()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat([found[row] for row in sorted(found)], dim=1), gradients


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("max_tokens", [1, 200, 10_000])
def test_one_prompt_for_all_branches_is_plain_batches(
    family: str, max_tokens: int, groups: list[Group]
) -> None:
    model = build(family)
    plain, plain_gradients = logprobs_and_gradients(model, groups, shares_prompts=False, max_tokens=500)
    assert open_attention(model)
    shared, gradients = logprobs_and_gradients(model, groups, shares_prompts=True, max_tokens=max_tokens)
    torch.testing.assert_close(shared, plain, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        # The models norm in single precision whatever their weights are.
        difference = (gradient - plain_gradients[name]).norm()
        assert difference <= 1e-5 * plain_gradients[name].norm() + 1e-6, name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_plain_calls_go_on_as_before(family: str, groups: list[Group]) -> None:
    model = build(family)
    plain, _ = logprobs_and_gradients(model, groups, shares_prompts=False, max_tokens=500)
    open_attention(model)
    again, _ = logprobs_and_gradients(model, groups, shares_prompts=False, max_tokens=500)
    torch.testing.assert_close(again, plain, rtol=0.0, atol=0.0)


LEFT_ALONE: dict[str, tuple[type, object]] = {
    "chunks longer than the probe": (
        Llama4ForCausalLM,
        Llama4TextConfig(
            **NARROW,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=12,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        ),
    ),
    "a window in the mask that attention is not told of": (
        PhimoeForCausalLM,
        PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=12),
    ),
    "two attentions in a layer": (DiffLlamaForCausalLM, DiffLlamaConfig(**NARROW)),
    "layers that look back by convolution, and in new models hardly": (
        Lfm2ForCausalLM,
        Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"]),
    ),
}


@pytest.mark.parametrize("what", list(LEFT_ALONE))
def test_what_a_short_probe_cannot_tell_is_left_alone(what: str) -> None:
    kind, config = LEFT_ALONE[what]
    torch.manual_seed(0)
    model = kind(deepcopy(config)).eval()
    assert model.config._attn_implementation == "sdpa"
    assert not open_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_open_model_stays_open() -> None:
    model = build("llama")
    assert open_attention(model)
    assert open_attention(model)


def test_soft_caps_are_left_alone() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))
    before = model.config._attn_implementation
    assert not open_attention(model)
    assert model.config._attn_implementation == before


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_gives_what_padded_tables_give(window: int | None, groups: list[Group]) -> None:
    texts = [g.prompt_tokens for g in groups], [[b.tokens for b in g.branches] for g in groups]
    tables, flex = (SharedPrompts(*texts, torch.device("cpu"), flex=flex) for flex in (False, True))
    num_tokens = len(tables.input_ids)
    torch.manual_seed(0)
    query, key, value = (torch.randn(num_tokens, heads, 16) for heads in (4, 2, 2))
    for attends in (tables, flex):
        assert len(attends.input_ids) == num_tokens
    with torch.no_grad():
        expected = tables(query, key, value, layer=0, scaling=0.3, window=window)
        got = flex(query, key, value, layer=0, scaling=0.3, window=window)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_branch_does_not_see_its_sisters(groups: list[Group]) -> None:
    model = build("llama")
    assert open_attention(model)
    one, *others = groups
    changed = Group(one.id, one.prompt_tokens, one.teachers, (*one.students[:2], Branch((5, 6), True, "")))
    first, _ = logprobs_and_gradients(model, [one, *others], shares_prompts=True, max_tokens=10_000)
    second, _ = logprobs_and_gradients(model, [changed, *others], shares_prompts=True, max_tokens=10_000)
    same = sum(len(branch.tokens) for branch in one.branches[:3])
    torch.testing.assert_close(second[:, :same], first[:, :same])
