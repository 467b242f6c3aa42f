"""Cost against work: seconds of a whole step as its groups double, and so its tokens.

The ratio is 1 over the exponent of the line through their logarithms: above 1, double the work takes less
than double the time. Promised is an exponent of at most 1.05.
"""

import numpy as np
import torch

from benchmarks.gad_step import GadStep
from benchmarks.result import Result, seconds
from benchmarks.subjects import MIDDLE, QUICK, TINY, Shape, new_examples, new_renderer
from gadfly.config.recipe import EngineConfig

_SHAPE = Shape(8, 8, 64, 128)
_GROUPS = (1, 2, 4, 8)
_ROUNDS = 5
_HIGHEST_EXPONENT = 1.05
CASES = ("",)


def run(case: str, quick: bool) -> Result:
    """Measure all sizes of a step in turn, round by round."""
    size, shape, rounds = (TINY, QUICK, 1) if quick else (MIDDLE, _SHAPE, _ROUNDS)
    counts = _GROUPS[:2] if quick else _GROUPS
    step = GadStep(size, shape, EngineConfig().micro_batch_tokens)
    examples = new_examples(shape, new_renderer(size), size)
    step(examples)
    times = [[seconds(lambda n=count: step(examples[:n])) for count in counts] for _ in range(rounds)]
    exponents = [float(np.polyfit(np.log(counts), np.log(row), 1)[0]) for row in times]
    medians = ", ".join(f"{value:.3g}" for value in np.median(times, axis=0))
    details = (
        f"exponent {np.median(exponents):.3f}; {medians} s for {', '.join(map(str, counts))} groups, "
        f"{torch.get_num_threads()} threads, {rounds} rounds"
    )
    return Result.of_pairs("cost", [1 / exponent for exponent in exponents], 1 / _HIGHEST_EXPONENT, details)
