"""The same step as in `step.py` on a model of SmolLM2-135M's size (in random weights).

Here the work is in matrix products, so no more can be won than the token counts allow; 85 % of that is
wanted. Long texts take many minutes a pair; `step_smollm2:64/128` measures the short ones alone.
"""

from benchmarks.result import Result
from benchmarks.rival import Passes
from benchmarks.step import measure
from benchmarks.subjects import QUICK, SMOLLM2, TINY, Shape

_SHAPES = {"64/128": Shape(2, 8, 64, 128), "1024/256": Shape(2, 8, 1024, 256)}
# Beyond 400 tokens in a pass, a token takes no less time. A pass over four long responses and the teacher's
# needs more than 23 GB beside two sets of models, gradients and moments; two and the teacher's fit.
_PASSES = {"64/128": Passes(4, 1, 8), "1024/256": Passes(2, 1, 2)}
_MICRO_BATCH_TOKENS = 4096
_PAIRS = 3
CASES = tuple(_SHAPES)


def run(case: str, quick: bool) -> Result:
    """Measure at one of the lengths."""
    if quick:
        return measure(f"step_smollm2:{case}", TINY, QUICK, Passes(2, 1, 1), 1, None)
    return measure(
        f"step_smollm2:{case}", SMOLLM2, _SHAPES[case], _PASSES[case], _PAIRS, None, _MICRO_BATCH_TOKENS
    )
