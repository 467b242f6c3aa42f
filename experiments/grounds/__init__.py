"""Where the arms compete: data, models, and what is measured, all made from a seed."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from gadfly.config import Recipe
from gadfly.reward_functions import RewardFunction
from gadfly.stages.run import Run


class Ground(Protocol):
    """What a module of this package offers."""

    def prepare(self, folder: Path, seed: int, settings: Mapping[str, Any]) -> None:
        """Write `data/` and `models/` into the folder of a seed; the same for the same seed."""

    def measure(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Put what only this ground's oracle knows of every model into the run's `summary.json`."""


def open_ground(name: str) -> Ground:
    """The ground of a name."""
    return cast(Ground, import_module(f"experiments.grounds.{name}"))


def reward_functions(ground: Ground, recipe: Recipe) -> dict[str, RewardFunction]:
    """What a recipe's `gad.rewards` name, from the ground's own module."""
    return {
        name: getattr(ground, reward.function.rpartition(":")[2])
        for name, reward in recipe.gad.rewards.items()
    }
