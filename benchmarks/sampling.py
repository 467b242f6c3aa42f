"""The local sampler against `model.generate(num_return_sequences=G)`.

Prompts, counts, lengths and temperature are the same. No response ends before the cap on either side.
"""

import torch

from benchmarks.result import Result, time_in_turn
from benchmarks.subjects import (
    DEMO,
    QUICK,
    SMOLLM2,
    TEMPERATURE,
    TINY,
    Shape,
    new_groups,
    new_model,
)
from gadfly.samplers import LocalSampler, requests_for

_SUBJECTS = {
    "demo": (DEMO, Shape(8, 8, 64, 128)),
    "demo-long": (DEMO, Shape(8, 8, 1024, 256)),
    "smollm2": (SMOLLM2, Shape(2, 8, 64, 128)),
}
_WANTED = {"demo": 2.5, "demo-long": 2.5, "smollm2": 1.5}
_PAIRS = 5
CASES = tuple(_SUBJECTS)


def run(case: str, quick: bool) -> Result:
    """Measure on a model of one of the sizes."""
    size, shape = (TINY, QUICK) if quick else _SUBJECTS[case]
    groups = new_groups(shape, size)
    model = new_model(size, shares_prompts=False)
    prompts = torch.tensor([group.prompt_tokens for group in groups])
    sampler = LocalSampler(new_model(size, shares_prompts=True), frozenset({size.vocabulary}))
    requests = requests_for(groups, shape.group_size, 0, "benchmark")

    def rival() -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            num_return_sequences=shape.group_size,
            max_new_tokens=shape.response_tokens,
        )

    def ours() -> None:
        sampler.sample(requests, temperature=TEMPERATURE, max_response_tokens=shape.response_tokens)

    times = time_in_turn(1 if quick else _PAIRS, rival, ours)
    details = (
        f"P {shape.prompts} x G {shape.group_size}, prompts of {shape.prompt_tokens} tokens, "
        f"responses of {shape.response_tokens}"
    )
    return Result.of_times(f"sampling:{case}", times, _WANTED[case], details)
