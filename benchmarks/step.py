"""A whole GAD step (sample, score, both updates) on a model of the demo's size, against trl's GRPOTrainer.

The rival is in `rival.py`, our side in `gad_step.py`: same weights, prompts, teacher responses, lengths,
threads, temperature and KL term; no response ends before the cap. They take turns in one process.
"""

import tempfile
from pathlib import Path

from benchmarks.gad_step import GadStep
from benchmarks.result import Result
from benchmarks.rival import Passes, run_beside
from benchmarks.subjects import DEMO, QUICK, TINY, Shape, Size, new_examples, new_renderer
from benchmarks.token_counts import in_words, step_bound
from gadfly.config.recipe import EngineConfig

_SHAPES = {"64/128": Shape(8, 8, 64, 128), "1024/256": Shape(8, 8, 1024, 256)}
_WANTED = {"64/128": 4.0, "1024/256": 8.0}
# The rival's fastest of (64, 8), (32, 8), (16, 8), (16, 2) and (8, 1), and of (16, 2), (8, 1) and (4, 1).
_PASSES = {"64/128": Passes(8, 1, 8), "1024/256": Passes(16, 2, 8)}
_PAIRS = 5
CASES = tuple(_SHAPES)


def run(case: str, quick: bool) -> Result:
    """Measure at one of the lengths."""
    if quick:
        return measure(f"step:{case}", TINY, QUICK, Passes(2, 1, 2), 1, _WANTED[case])
    return measure(f"step:{case}", DEMO, _SHAPES[case], _PASSES[case], _PAIRS, _WANTED[case])


def measure(
    bench: str,
    size: Size,
    shape: Shape,
    passes: Passes,
    pairs: int,
    wanted: float | None,
    micro_batch_tokens: int = EngineConfig().micro_batch_tokens,
) -> Result:
    """Measure steps of a size and shape; by default 85 % of the token bound is wanted."""
    examples = new_examples(shape, new_renderer(size), size)
    step = GadStep(size, shape, micro_batch_tokens)
    with tempfile.TemporaryDirectory() as temporary:
        times, settings = run_beside(
            size, shape, passes, examples, pairs + 1, Path(temporary), lambda: step(examples)
        )
    bound = step_bound(shape, passes)
    details = (
        f"P {shape.prompts} x G {shape.group_size}, {in_words(bound, step_bound(shape, passes, size))}, "
        f"ours: micro_batch_tokens={micro_batch_tokens}; {settings}"
    )
    return Result.of_times(bench, times, 0.85 * bound if wanted is None else wanted, details)
