"""Trains one role's model: forward, forward_backward, step, weights, state."""

from gadfly.engine.engine import Engine, Objective, Output
from gadfly.engine.precision import Precision, faster_precision
from gadfly.engine.schedule import scheduled_learning_rate
from gadfly.engine.sharding import frozen_weights

__all__ = [
    "Engine",
    "Objective",
    "Output",
    "Precision",
    "faster_precision",
    "frozen_weights",
    "scheduled_learning_rate",
]
