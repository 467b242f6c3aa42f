"""Models that bring attention or states of their own, and read padded rows: same numbers, or a refusal."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Lfm2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from gadfly.attention import open_attention, takes_attention
from gadfly.errors import AlarmError, UserError
from gadfly.groups import Branch, Group
from gadfly.logprobs import LogprobReader
from gadfly.packing import pack
from gadfly.samplers import LocalSampler, Request

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LINEAR, FULL = "linear_attention", "full_attention"
CAPPED = Gemma2Config(**SIZES, head_dim=8, sliding_window=4)
HYBRIDS = {
    "lfm2": Lfm2Config(**SIZES, full_attn_idxs=[1], block_auto_adjust_ff_dim=False),
    "qwen3-next": Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        layer_types=[LINEAR, FULL, LINEAR],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "falcon-h1": FalconH1Config(
        **SIZES,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
}
KEEP_TO_THEMSELVES = {
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent-gemma": RecurrentGemmaConfig(
        **{**SIZES, "num_key_value_heads": 1}, lru_width=32, attention_window_size=16
    ),
}
PROMPTS = ((5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (15,))


def new_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose logits hang on what was said before."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(5)
    open_attention(model)
    assert not takes_attention(model)
    return model


def drawn(model: PreTrainedModel, end_ids: frozenset[int] = frozenset()) -> list[Group]:
    """Two samples of each prompt with their log-probabilities, checked against each text alone."""
    requests = [Request(prompt, 2, str(place)) for place, prompt in enumerate(PROMPTS)]
    sampler = LocalSampler(model, end_ids)
    answers = sampler.sample(requests, temperature=1.0, max_response_tokens=6)
    for prompt, samples in zip(PROMPTS, answers, strict=True):
        for sample in samples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + sample.tokens]), use_cache=False).logits[0]
            alone = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = alone.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(sample.logprobs, dtype=expected.dtype), expected, rtol=1e-4, atol=1e-4
            )
    return [
        Group(str(place), prompt, students=tuple(Branch(s.tokens, s.finished, "") for s in samples))
        for place, (prompt, samples) in enumerate(zip(PROMPTS, answers, strict=True))
    ]


def test_soft_caps_in_double_precision_give_numbers_to_sampler_and_trainer_alike() -> None:
    model = new_model(CAPPED, torch.float64)
    groups = drawn(model)
    batch = pack(groups, range(len(groups)), torch.device("cpu"))
    read = LogprobReader()(model, batch).values
    read.sum().backward()
    alone = [
        LogprobReader()(model, pack([group], [0], torch.device("cpu"))).values.detach() for group in groups
    ]
    torch.testing.assert_close(read.detach(), torch.cat(alone), rtol=1e-6, atol=1e-6)
    assert all(bool(w.grad.isfinite().all()) for w in model.parameters() if w.grad is not None)


@pytest.mark.parametrize("name", HYBRIDS)
def test_recurrent_states_go_with_their_samples_as_others_end(name: str) -> None:
    # A third of the tokens end a sample, so that rows are dropped at most steps.
    drawn(new_model(HYBRIDS[name]), frozenset(range(0, 64, 3)))


@pytest.mark.parametrize("name", KEEP_TO_THEMSELVES)
def test_a_model_that_keeps_its_states_to_itself_is_refused_in_a_line(name: str) -> None:
    with pytest.raises(UserError, match=r"recurrent states.*sampling.servers") as refusal:
        LocalSampler(new_model(KEEP_TO_THEMSELVES[name]), frozenset())
    assert "\n" not in str(refusal.value)


def test_attention_of_its_own_is_told_once_a_kind_of_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gadfly")
    model = new_model(HYBRIDS["lfm2"])
    # Other tests have opened the kind by its name.
    model.__class__ = type("Unheard", (type(model),), {})
    for _ in range(2):
        assert not open_attention(model)
    assert caplog.text.count("Unheard: prompts are computed once an answer") == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_weights_are_no_numbers_is_not_sampled_from(temperature: float) -> None:
    model = new_model(CAPPED)
    torch.nn.init.constant_(model.get_parameter("model.norm.weight"), float("nan"))
    request = Request(PROMPTS[0], 2, "0")
    with pytest.raises(AlarmError, match=r"2 of 2 samples are not finite.*diverged") as alarm:
        LocalSampler(model, frozenset()).sample([request], temperature=temperature, max_response_tokens=2)
    assert "\n" not in str(alarm.value)
