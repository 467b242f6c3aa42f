"""Which precision is the faster one on this machine: timed, since no name of a processor tells.

Where a processor has no instructions for it, bfloat16 may be sixty times slower than single precision.
"""

import time
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]

# Below this a gain is within what timing leaves open, and not worth the rounding.
_CLEARLY_FASTER = 1.15
# The weights are as in the MLP of a small language model. The rows (tokens) grow until a pass takes long
# enough to be timed, up to a micro-batch of the default size.
_IN, _OUT = 768, 3072
_FEWEST_ROWS, _MOST_ROWS = 16, 16384
_LONG_ENOUGH_SECONDS = 0.02
_TRIAL_SECONDS, _MOST_PASSES = 0.1, 10


def faster_precision(device: torch.device) -> tuple[Precision, dict[str, float | int]]:
    """Time a matrix product and its backward pass in single precision and under bfloat16 autocast.

    bfloat16 is chosen only if it is more than 1.15 times as fast. It takes less than a second. Another time
    may give another answer, so the first one must be kept for a run that is resumed. The number of threads is
    torch's at the call.

    Args:
        device: where the models will be.

    Returns:
        The choice, and what it rests on: the seconds of a pass and how many rows (tokens) it had. bfloat16
        has fewer rows where a sixteenth of them took so long that it had lost already.
    """
    # The first pass of either kind sets libraries up.
    for is_autocast in (False, True):
        _pass_seconds(device, 1, is_autocast)
    rows = _FEWEST_ROWS
    single_seconds = _best_seconds(device, rows, is_autocast=False)
    while single_seconds < _LONG_ENOUGH_SECONDS and rows < _MOST_ROWS:
        rows *= 4
        single_seconds = _best_seconds(device, rows, is_autocast=False)
    half_rows = rows // 16
    half_seconds = _best_seconds(device, half_rows, is_autocast=True)
    if half_seconds < single_seconds / 2:
        half_rows, half_seconds = rows, _best_seconds(device, rows, is_autocast=True)
    is_faster = half_rows == rows and single_seconds > _CLEARLY_FASTER * half_seconds
    return "bfloat16" if is_faster else "float32", {
        "float32_seconds": single_seconds,
        "float32_rows": rows,
        "bfloat16_seconds": half_seconds,
        "bfloat16_rows": half_rows,
    }


def _best_seconds(device: torch.device, rows: int, *, is_autocast: bool) -> float:
    """The shortest of several passes; one alone where it is long."""
    passes: list[float] = []
    while len(passes) < _MOST_PASSES and sum(passes) < _TRIAL_SECONDS:
        passes.append(_pass_seconds(device, rows, is_autocast))
    return min(passes)


def _pass_seconds(device: torch.device, rows: int, is_autocast: bool) -> float:
    inputs = torch.ones(rows, _IN, device=device, requires_grad=True)
    weight = torch.ones(_OUT, _IN, device=device, requires_grad=True)
    _wait_for(device)
    started = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_autocast):
        product = torch.nn.functional.linear(inputs, weight)
    product.sum().backward()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    # A GPU works on after the call has returned.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
