"""Branches that share their prompt's keys draw what rows with a cache of their own draw, and faster."""

import random
from typing import Any

import pytest
import torch
from test_shared_prompt import FAMILIES, VOCABULARY, build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from gadfly.attention import open_attention
from gadfly.groups import Branch, Group
from gadfly.logprobs import LogprobReader, log_distribution
from gadfly.packing import micro_batches
from gadfly.samplers import LocalSampler, Request, Sample
from gadfly.samplers.decoding import PaddedDecoder, SharedDecoder, open_decoder

TEMPERATURE = 0.8
ENDS = frozenset(range(3))
NONE = frozenset({VOCABULARY})
"""What no sample ends with."""


def requests_of(lengths: list[int], num_samples: int) -> list[Request]:
    rng = random.Random(0)
    return [
        Request(tuple(rng.randrange(VOCABULARY) for _ in range(length)), num_samples, f"{place}")
        for place, length in enumerate(lengths)
    ]


# Shorter and longer than the windows of five tokens, and sorted by nothing.
REQUESTS = requests_of([7, 1, 30, 2, 1, 19], 4)


def draw(
    model: PreTrainedModel,
    requests: list[Request] = REQUESTS,
    *,
    cap: int = 70,
    ends: frozenset[int] = ENDS,
    parallel: int = 100,
    temperature: float = TEMPERATURE,
) -> list[Sample]:
    sampler = LocalSampler(model, ends, max_parallel_responses=parallel)
    answers = sampler.sample(requests, temperature=temperature, max_response_tokens=cap)
    return [sample for group in answers for sample in group]


def opened(family: str) -> PreTrainedModel:
    model = build(family)
    assert open_attention(model)
    return model


def assert_same(samples: list[Sample], expected: list[Sample], accuracy: float = 1e-10) -> None:
    assert len(samples) == len(expected)
    for sample, twin in zip(samples, expected, strict=True):
        assert (sample.tokens, sample.finished) == (twin.tokens, twin.finished)
        assert sample.logprobs == pytest.approx(twin.logprobs, abs=accuracy)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_shared_prompts_give_the_samples_of_padded_rows(family: str) -> None:
    expected = draw(build(family))
    lengths = {len(sample.tokens) for sample in expected}
    # Rows end one by one, and some outgrow the first room of the tables twice.
    assert len(lengths) > 8
    assert max(lengths) > 64
    model = opened(family)
    for parallel in (8, 100):
        assert_same(draw(model, parallel=parallel), expected)


def test_greedy_samples_are_those_of_padded_rows_too() -> None:
    assert_same(
        draw(opened("gemma3"), temperature=0.0, cap=20), draw(build("gemma3"), temperature=0.0, cap=20)
    )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_samples_are_those_of_a_loop_without_any_cache(family: str) -> None:
    model = opened(family)
    requests = requests_of([3, 11, 1], 2)
    samples = iter(draw(model, requests, cap=12, ends=NONE))
    for request in requests:
        for index in range(request.num_samples):
            sample = next(samples)
            ids = list(request.prompt_tokens)
            for token, logprob, uniform in zip(
                sample.tokens, sample.logprobs, request.uniforms(index, 12), strict=True
            ):
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                distribution = log_distribution(logits, TEMPERATURE)
                chances = distribution.exp()
                below = float(chances[:token].sum())
                assert below - 1e-12 <= uniform <= below + float(chances[token]) + 1e-12
                assert logprob == pytest.approx(float(distribution[token]), abs=1e-10)
                ids.append(token)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_logprobs_in_single_precision_are_those_the_trainer_reads(family: str) -> None:
    model = opened(family).float()
    samples = draw(model, cap=40)
    groups = [
        Group(
            str(place),
            request.prompt_tokens,
            students=tuple(Branch(s.tokens, s.finished, "") for s in samples[4 * place : 4 * place + 4]),
        )
        for place, request in enumerate(REQUESTS)
    ]
    (batch,) = micro_batches(groups, 10**6, torch.device("cpu"), shares_prompts=True)
    with torch.no_grad():
        read = LogprobReader(TEMPERATURE)(model, batch).values
    for row, values in zip(batch.rows.tolist(), read.tolist(), strict=True):
        logprobs = samples[row].logprobs
        assert values[: len(logprobs)] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_one_row_that_outlives_all_others_is_what_it_is_among_them(family: str) -> None:
    model = opened(family)
    everyone = draw(model, ends=NONE)
    for survivor in (0, 10, len(everyone) - 1):
        words = set(everyone[survivor].tokens)
        left = draw(model, ends=frozenset(range(VOCABULARY)) - words)
        assert_same([left[survivor]], [everyone[survivor]])
        assert sum(len(sample.tokens) == 70 for sample in left) == 1


def test_rows_may_end_all_at_once() -> None:
    samples = draw(opened("llama"), ends=frozenset(range(VOCABULARY)))
    assert_same(samples, draw(build("llama"), ends=frozenset(range(VOCABULARY))))
    assert all(sample.finished and len(sample.tokens) == 1 for sample in samples)


def test_requests_for_different_numbers_of_samples_may_come_together() -> None:
    requests = [
        Request(request.prompt_tokens, count, request.stream)
        for request, count in zip(REQUESTS, (1, 3, 1, 2, 3, 1), strict=True)
    ]
    model = opened("llama")
    together = LocalSampler(model, ENDS).sample(requests, temperature=1.0, max_response_tokens=20)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = LocalSampler(model, ENDS).sample([request], temperature=1.0, max_response_tokens=20)
        assert len(alone) == request.num_samples
        assert_same(answer, alone)


def test_many_prompts_are_computed_in_parts() -> None:
    requests = requests_of([30, 29, 28] * 100, 1)
    model = opened("llama")
    together = draw(model, requests, cap=3, parallel=300)
    assert_same(together, draw(model, requests, cap=3, parallel=20))


class _Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


def test_a_step_copies_no_cache() -> None:
    prompts = [request.prompt_tokens for request in requests_of([90] * 4, 1)]
    largest: dict[type, int] = {}
    # Of one layer: 4 prompts of 90 tokens, 2 heads of 8 channels in double precision.
    keys = 4 * 90 * 2 * 8 * 8
    for model in (build("llama"), opened("llama")):
        decoder = open_decoder(model, prompts, 4, 20)
        with torch.no_grad():
            decoder.prefill()
            with _Largest() as mode:
                for _ in range(10):
                    decoder.step(torch.arange(16))
        largest[type(decoder)] = mode.bytes
    # Four branches a prompt: one way copies its keys to each of them, the other makes no more than scores.
    assert largest[PaddedDecoder] > 4 * keys
    assert largest[SharedDecoder] < 2 * keys
