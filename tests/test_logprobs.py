"""Log-probabilities from chunks of logits: the same numbers and gradients, and no big tensor alive."""

import pytest
import torch
from test_shared_prompt import FAMILIES, SIZES, build
from tiny import random_groups
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from gadfly.attention import open_attention
from gadfly.logprobs import LogprobReader, chunked_logprobs, has_plain_head
from gadfly.packing import micro_batches

CPU = torch.device("cpu")


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operators made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._alive = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage] = storage.nbytes()
        self.most = max(self.most, sum(self._alive.values()))
        return out


def plain_logprobs(
    head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The slow twin: all logits at once."""
    distribution = torch.distributions.Categorical(logits=head(hidden) / temperature)
    return distribution.log_prob(tokens), distribution.entropy()


@pytest.mark.parametrize("chunk_logits", [1, 50, 200, 10**6])
def test_chunks_of_logits_give_the_values_and_gradients_of_all_at_once(chunk_logits: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 17, bias=True).double()
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(17, (23,))
    weight = torch.randn(23, dtype=torch.float64)
    found = []
    for read in (
        plain_logprobs(head, hidden, tokens, 0.7),
        chunked_logprobs(head, hidden, tokens, 0.7, chunk_logits=chunk_logits),
    ):
        gradients = torch.autograd.grad((read[0] * weight).sum(), [hidden, *head.parameters()])
        found.append([*(value.detach() for value in read), *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_no_entropy_takes_a_gradient() -> None:
    head, hidden = nn.Linear(3, 5), torch.randn(4, 3, requires_grad=True)
    _, entropy = chunked_logprobs(head, hidden, torch.zeros(4, dtype=torch.long), 1.0, chunk_logits=5)
    assert not entropy.requires_grad


def test_memory_beyond_the_weights_does_not_grow_with_the_vocabulary() -> None:
    peaks = {}
    for vocabulary in (1_000, 8_000):
        head = nn.Linear(16, vocabulary, bias=False)
        hidden = torch.randn(400, 16, requires_grad=True)
        tokens = torch.zeros(400, dtype=torch.long)
        with Peak() as peak:
            values, _ = chunked_logprobs(head, hidden, tokens, 1.0, chunk_logits=40_000)
            values.sum().backward()
        # As large as the weights are their gradient so far, that of a chunk, and the sum of the two.
        peaks[vocabulary] = peak.most - 3 * head.weight.nbytes
    assert peaks[8_000] < 1.2 * peaks[1_000]
    all_at_once = 400 * 8_000 * 4
    assert peaks[8_000] < all_at_once / 4


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("shares_prompts", [False, True])
def test_chunks_give_what_the_models_own_logits_give(family: str, shares_prompts: bool) -> None:
    model = build(family)
    assert open_attention(model)
    assert has_plain_head(model)
    groups = random_groups(3, 4, teachers=1, students=2, vocabulary=SIZES["vocab_size"])
    (batch,) = micro_batches(groups, 10**6, CPU, shares_prompts=shares_prompts)
    plain = LogprobReader(0.8)(model, batch)
    chunked = LogprobReader(0.8, is_chunked=True)(model, batch)
    torch.testing.assert_close(chunked.values, plain.values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chunked.entropy, plain.entropy, rtol=1e-9, atol=1e-9)


def _capped() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.01))


def _hardly_capped() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=30.0))


def _scaled() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5))


@pytest.mark.parametrize("made", [_capped, _hardly_capped, _scaled])
def test_logits_with_more_than_the_head_in_them_are_the_models_own(made: object) -> None:
    torch.manual_seed(0)
    assert not has_plain_head(made().eval())  # type: ignore[operator]
    assert has_plain_head(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
