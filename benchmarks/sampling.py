"""The local sampler against `model.generate(num_return_sequences=G)`, and vLLM too where it is installed.

`packed` is against the local sampler itself, with the model's own weights in place of packed copies.
Prompts, counts, caps and temperature are the same. Responses end before the cap in `ending` alone.
"""

import importlib.util
import itertools
import tempfile
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from benchmarks.result import Result, time_in_turn
from benchmarks.subjects import (
    DEMO,
    MIDDLE,
    QUICK,
    SMOLLM2,
    TEMPERATURE,
    TINY,
    Shape,
    new_groups,
    new_model,
)
from gadfly.logprobs import log_distribution
from gadfly.samplers import Canary, LocalSampler, Sampler, VllmSampler, packing_dtype, requests_for

_SUBJECTS = {
    "demo": (DEMO, Shape(8, 8, 64, 128)),
    "demo-long": (DEMO, Shape(8, 8, 1024, 256)),
    "smollm2": (SMOLLM2, Shape(2, 8, 64, 128)),
    "ending": (SMOLLM2, Shape(2, 8, 64, 128)),
    "packed": (SMOLLM2, Shape(2, 8, 64, 128)),
    "vllm": (SMOLLM2, Shape(2, 8, 64, 128)),
}
_WANTED = {"demo": 2.5, "demo-long": 2.5, "smollm2": 1.5, "ending": 1.5, "packed": 1.2, "vllm": 0.0}
_PAIRS = 5
_NO_END = frozenset[int]()
# In `ending`, with random weights about one token in so many is an end.
_TOKENS_TO_END = 64
_HAS_VLLM = importlib.util.find_spec("vllm") is not None
CASES = tuple(case for case in _SUBJECTS if case != "vllm" or _HAS_VLLM)


def run(case: str, quick: bool) -> Result:
    """Measure on a model of one of the sizes."""
    size, shape = _SUBJECTS[case]
    if quick:
        # No attention of vLLM's takes heads as narrow as the tiny model's.
        size, shape = MIDDLE if case == "vllm" else TINY, QUICK
    groups = new_groups(shape, size)
    model = new_model(size, shares_prompts=False)
    prompts = torch.tensor([group.prompt_tokens for group in groups])
    ends = frozenset(range(size.vocabulary // _TOKENS_TO_END)) if case == "ending" else _NO_END
    sampler = _vllm(model) if case == "vllm" else _local(new_model(size, shares_prompts=True), ends)
    turns = itertools.count()

    def generate() -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            num_return_sequences=shape.group_size,
            max_new_tokens=shape.response_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
        )

    def sample(sampler: Sampler) -> None:
        # New samples each time, as the rival draws.
        requests = requests_for(groups, shape.group_size, 0, f"benchmark/{next(turns)}")
        sampler.sample(requests, temperature=TEMPERATURE, max_response_tokens=shape.response_tokens)

    rival = generate
    if case == "packed":
        rival = partial(sample, LocalSampler(new_model(size, shares_prompts=True), _NO_END))
    ours = partial(sample, sampler)
    times = time_in_turn(1 if quick else _PAIRS, rival, ours)
    details = (
        f"P {shape.prompts} x G {shape.group_size}, prompts of {shape.prompt_tokens} tokens, "
        f"responses of {'at most ' if ends else ''}{shape.response_tokens}"
    )
    return Result.of_times(f"sampling:{case}", times, _WANTED[case], details)


def _local(model: PreTrainedModel, ends: frozenset[int]) -> Sampler:
    return LocalSampler(model, ends, copy_dtype=packing_dtype(model))


def _vllm(model: PreTrainedModel) -> Sampler:
    """The other sampler, with the weights of a model, which it can read from a folder alone."""

    def logprobs(tokens: Sequence[int]) -> list[float]:
        ids = torch.tensor(tokens)
        with torch.inference_mode():
            distribution = log_distribution(model(input_ids=ids[None]).logits[0, :-1], 1.0)
        values: list[float] = distribution.gather(-1, ids[1:, None]).squeeze(-1).tolist()
        return values

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return VllmSampler(folder, model, _NO_END, Canary(logprobs), max_tokens=256)
