"""Win rates of one model against another: as the judge said, and as if answers were equally long."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gadfly.statistics import Figure, bootstrap

Outcome = Literal["win", "tie", "loss"]
"""How the first model fares on one prompt."""

_VALUES: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}

# Weight of phi²/2 beside the cross-entropy summed over prompts: phi is taken to be some 3 in size.
# For a judge who only sees length, smaller weights made the figure wilder (standard deviation 0.14 at
# 0.01 and 80 prompts, 0.10 at 0.1), larger ones left more of the length in it (0.62 at 1, 0.56 at 0.1).
_RIDGE = 0.1
_MAX_STEPS = 100


def win_rate(outcomes: Sequence[Outcome]) -> Figure:
    """Share of wins, a tie counting half, with a bootstrap interval over prompts.

    Equal outcomes have an interval of width 0: the sample shows no spread, which does not mean there
    is none.

    Raises:
        ValueError: there is no outcome.

    Example:
        >>> win_rate(["win", "win", "tie", "loss"]).value
        0.625
    """
    if not outcomes:
        raise ValueError("win_rate: no outcome given; it needs at least one")
    values = [_VALUES[outcome] for outcome in outcomes]
    return bootstrap(values, lambda cases: sum(cases) / len(cases))


def length_controlled_win_rate(outcomes: Sequence[Outcome], length_differences: Sequence[int]) -> Figure:
    """The win rate had both answers been equally long, with a bootstrap interval over prompts.

    The logistic model of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) is fitted,

        logit P(win) = theta + phi * tanh(difference / standard deviation of the differences),

    and P(win) is read off at difference 0, as the mean over prompts, which here is one value. A tie
    is half a win in the cross-entropy. It differs from AlpacaEval's own figure in two things:

    - Their third term, each instruction's difficulty, is estimated from the answers of many models,
      and is left out for a lone pair.
    - They choose the strength of an L1 penalty by cross-validation and add two baselines of known
      length; here a small ridge on phi alone keeps it finite where length decides every outcome.

    The control is as good as the lengths are spread. Where they do not vary, or all outcomes are
    equal, the figure is the raw win rate. Where length decides all and comes in two sizes only, part
    of it stays: a judge who prefers the longer in 80 of 100 prompts gets 0.67, not 0.5.

    Args:
        outcomes: of the first model, a prompt each.
        length_differences: the first model's answer minus the other's, in characters, a prompt each.

    Raises:
        ValueError: there is no outcome, or the numbers of both differ.
    """
    if not outcomes or len(outcomes) != len(length_differences):
        raise ValueError(
            f"length_controlled_win_rate: {len(outcomes)} outcomes and {len(length_differences)} length "
            f"differences; it needs as many of each, and at least one"
        )
    values = np.array([_VALUES[outcome] for outcome in outcomes])
    differences = np.array(length_differences, dtype=float)
    return bootstrap(
        range(len(values)),
        lambda chosen: _win_rate_at_equal_lengths(values[[*chosen]], differences[[*chosen]]),
    )


def _win_rate_at_equal_lengths(values: NDArray[np.float64], differences: NDArray[np.float64]) -> float:
    if values.min() == values.max():
        # theta would be infinite, or 0 for ties.
        return float(values[0])
    spread = differences.std(ddof=1)
    if spread == 0:
        return float(values.mean())
    theta = _fit(values, np.tanh(differences / spread))
    return 1 / (1 + math.exp(-theta))


def _fit(values: NDArray[np.float64], lengths: NDArray[np.float64]) -> float:
    """The theta of least ridged cross-entropy, by Newton's method with halved steps."""
    design = np.column_stack([np.ones_like(lengths), lengths])
    ridge = np.array([0.0, _RIDGE])
    share = values.mean()
    weights = np.array([np.log(share / (1 - share)), 0.0])
    for _ in range(_MAX_STEPS):
        logits = design @ weights
        # In this form neither end overflows or loses digits.
        decay = np.exp(-np.abs(logits))
        chances = np.where(logits >= 0, 1, decay) / (1 + decay)
        curvature = decay / (1 + decay) ** 2
        gradient = design.T @ (chances - values) + ridge * weights
        step = np.linalg.solve((design.T * curvature) @ design + np.diag(ridge), gradient)
        # About twice the loss still to lose; below this, a full step leaves about the square of it.
        near = gradient @ step < 1e-9
        while not near and _loss(weights - step, design, values) > _loss(weights, design, values):
            step /= 2
        weights = weights - step
        if near:
            break
    return float(weights[0])


def _loss(weights: NDArray[np.float64], design: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    logits = design @ weights
    return float(np.logaddexp(0, logits).sum() - values @ logits + _RIDGE * weights[1] ** 2 / 2)
