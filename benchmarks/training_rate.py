"""Floating-point operations a second in training, as a share of what the machine's matrix product gives.

The operations are those that the mathematics asks for: products with the weights (the head on response tokens
only), and attention over what a token sees; what is computed again in the backward pass is not counted. The
machine's rate is of the same products at the same shapes, forward and backward, into memory at hand.
"""

from collections.abc import Callable

import torch

from benchmarks.result import Result, seconds
from benchmarks.subjects import (
    QUICK,
    SMOLLM2,
    TEMPERATURE,
    TINY,
    Shape,
    Size,
    new_discriminator,
    new_groups,
    new_model,
)
from benchmarks.token_counts import shared
from gadfly.config import Optimizer
from gadfly.config.recipe import EngineConfig
from gadfly.discriminator import read_scores
from gadfly.engine import Engine
from gadfly.groups import Group
from gadfly.logprobs import LogprobReader
from gadfly.objectives import discriminator_objective, grpo_objective

_SHAPE = Shape(2, 8, 64, 128)
_PAIRS = 5
_WANTED = 0.60
# An operation forward is two backward; a product is a multiplication and an addition.
_TRAINED, _PRODUCT = 3, 2
CASES = ("student", "discriminator")


def run(case: str, quick: bool) -> Result:
    """Measure the training pass of one of the roles."""
    size, shape = (TINY, QUICK) if quick else (SMOLLM2, _SHAPE)
    groups = new_groups(shape, size)
    if case == "student":
        groups = [group.only_students() for group in groups]
    counted = shared(shape, len(groups[0].branches))
    head_tokens = shape.prompts * shape.group_size * shape.response_tokens if case == "student" else 0
    products = _products(size, counted.tokens, head_tokens)
    product_work = sum(_TRAINED * _PRODUCT * rows * into * out for rows, into, out in products)
    # Scores and weighted sums over the keys that each query sees.
    work = product_work + _TRAINED * 2 * _PRODUCT * counted.pairs * size.hidden * size.layers
    train = _student(size, groups) if case == "student" else _discriminator(size, groups)
    rates = []
    for _ in range((1 if quick else _PAIRS) + 1):
        machine = product_work / sum(_product_seconds(*product) for product in products)
        rates.append((work / seconds(train), machine))
    rates = rates[1:]
    ours, machine = (max(rate) / 1e9 for rate in zip(*rates, strict=True))
    details = (
        f"at best {ours:.1f} against {machine:.1f} GFLOP/s, {counted.tokens} tokens, "
        f"{torch.get_num_threads()} threads, {len(rates)} pairs"
    )
    return Result.of_pairs(f"training_rate:{case}", [own / most for own, most in rates], _WANTED, details)


def _student(size: Size, groups: list[Group]) -> Callable[[], object]:
    engine = Engine(
        new_model(size, shares_prompts=True),
        LogprobReader(TEMPERATURE, is_chunked=True),
        micro_batch_tokens=EngineConfig().micro_batch_tokens,
        optimizer=Optimizer(),
    )
    advantages = torch.linspace(-1, 1, sum(len(group.students) for group in groups))
    objective = grpo_objective(groups, advantages, None, clip_range=0.2, kl_coefficient=0.0)
    return lambda: engine.forward_backward(groups, objective)


def _discriminator(size: Size, groups: list[Group]) -> Callable[[], object]:
    engine = Engine(
        new_discriminator(size, shares_prompts=True),
        read_scores,
        micro_batch_tokens=EngineConfig().micro_batch_tokens,
        optimizer=Optimizer(),
    )
    objective = discriminator_objective(groups, "bradley_terry")
    return lambda: engine.forward_backward(groups, objective)


def _products(size: Size, num_tokens: int, head_tokens: int) -> list[tuple[int, int, int]]:
    """Rows, columns in and out of every product with weights in a forward pass."""
    keys = size.hidden // size.heads * size.key_heads
    layer = [
        (size.hidden, size.hidden),
        (size.hidden, keys),
        (size.hidden, keys),
        (size.hidden, size.hidden),
        (size.hidden, size.intermediate),
        (size.hidden, size.intermediate),
        (size.intermediate, size.hidden),
    ]
    body = [(num_tokens, into, out) for into, out in layer] * size.layers
    return body + ([(head_tokens, size.hidden, size.vocabulary)] if head_tokens else [])


def _product_seconds(rows: int, into: int, out: int) -> float:
    """Forward, and both gradients."""
    inputs, weight, outputs = torch.ones(rows, into), torch.ones(out, into), torch.ones(rows, out)
    of_inputs, of_weight = torch.empty_like(inputs), torch.empty_like(weight)

    def passes() -> None:
        torch.mm(inputs, weight.T, out=outputs)
        torch.mm(outputs, weight, out=of_inputs)
        torch.mm(outputs.T, inputs, out=of_weight)

    return seconds(passes)
