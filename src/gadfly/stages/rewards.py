"""From the discriminator's scores to advantages: the reward as the recipe wants it, and others beside it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gadfly.config.training import DISCRIMINATOR_REWARD
from gadfly.errors import ConfigError
from gadfly.groups import Group
from gadfly.losses import bounded_reward, group_advantages, variance_shares
from gadfly.reward_functions import RewardFunction, rate
from gadfly.stages.diagnostics import Metrics
from gadfly.stages.examples import Example
from gadfly.stages.run import Run


class Rewards:
    """Makes a step's advantages; without options, `group_advantages` of the scores.

    Args:
        run: the open run, with a function for each of its `gad.rewards`.

    Raises:
        ConfigError: a function is missing.
    """

    def __init__(self, run: Run):
        settings = run.recipe.gad
        self._is_bounded = settings.reward == "log_sigmoid"
        self._weights = {name: reward.weight for name, reward in settings.rewards.items()}
        self._functions: Mapping[str, RewardFunction] = run.reward_functions
        self._processes = run.processes
        for name, reward in settings.rewards.items():
            if name not in self._functions:
                raise ConfigError(
                    f"gad.rewards.{name} = {reward.function}: is not loaded, for it is code; give "
                    f"--allow-code, or in Python open_run(recipe, reward_functions={{...}})"
                )

    def __call__(
        self, scores: Float[Tensor, "group sample"], batch: Sequence[Example], groups: Sequence[Group]
    ) -> tuple[Float[Tensor, "group sample"], Metrics]:
        """The advantages, and the share of their variance that each reward has, if there are several.

        Each reward is normalised within the group before it is weighted, so that neither its unit nor its
        offset matters.

        Args:
            scores: of the samples.
            batch: their prompts.
            groups: the samples as text.
        """
        own = group_advantages(bounded_reward(scores) if self._is_bounded else scores).to(scores.dtype)
        if not self._weights:
            return own, {}
        parts = {DISCRIMINATOR_REWARD: own}
        for name, weight in self._weights.items():
            # In double precision: a reward far from 0 may differ by less than single precision tells apart.
            rated = torch.tensor(self._rated(name, batch, groups), dtype=torch.float64, device=scores.device)
            parts[name] = weight * group_advantages(rated).to(scores.dtype)
        shares = zip(parts, variance_shares(list(parts.values())), strict=False)
        metrics = {f"detail/reward_share/{name}": share for name, share in shares}
        return sum(parts.values(), start=scores.new_zeros(())), metrics

    def _rated(self, name: str, batch: Sequence[Example], groups: Sequence[Group]) -> list[list[float]]:
        """What a function says of every sample. Each process asks about its part of the groups."""
        size, function = self._processes.size, self._functions[name]

        def part() -> list[list[float]]:
            return [
                rate(
                    name,
                    function,
                    batch[place].row.prompt,
                    [branch.text for branch in groups[place].students],
                    [branch.text for branch in groups[place].teachers],
                )
                for place in range(self._processes.rank, len(groups), size)
            ]

        parts = self._processes.gather("rewards", self._processes.together("rewards", part))
        return [parts[place % size][place // size] for place in range(len(groups))]
