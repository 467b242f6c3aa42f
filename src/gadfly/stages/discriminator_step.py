"""The discriminator's part of a step: one pass scores the fresh samples and, unless it rests, trains on them.

It rests where the recipe's schedule says so or an alarm stands. Its scores are the reward all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gadfly.config import DiscriminatorConfig
from gadfly.discriminator import Scores
from gadfly.engine import Engine
from gadfly.groups import Group
from gadfly.objectives import discriminator_objective
from gadfly.packing import num_rows
from gadfly.replay import Replay
from gadfly.stages.diagnostics import (
    GroupScores,
    Metrics,
    accuracy_and_gap,
    discriminator_metrics,
    scores_by_group,
)

RECENT_STEPS = 5
"""Steps whose fresh accuracies decide together whether the discriminator rests."""


@dataclass
class UpdateSchedule:
    """At which steps the discriminator moves.

    Attributes:
        every: at every n-th.
        rests_above: not while its mean fresh accuracy over the last steps is above this.
        recent: the fresh accuracies of the last steps, the newest at the end.

    Example:
        >>> schedule = UpdateSchedule(rests_above=0.9, recent=[0.85, 0.97])
        >>> schedule.moves(7)
        False
        >>> schedule.note(0.8)
        >>> schedule.moves(8)
        True
    """

    every: int = 1
    rests_above: float | None = None
    recent: list[float] = field(default_factory=list)

    @property
    def is_vanilla(self) -> bool:
        """Whether it moves at every step."""
        return self.every == 1 and self.rests_above is None

    def moves(self, step: int) -> bool:
        """Whether it moves at a step, counted from 1."""
        recent = self.recent[-RECENT_STEPS:]
        if self.rests_above is not None and recent and sum(recent) / len(recent) > self.rests_above:
            return False
        return step % self.every == 0

    def note(self, accuracy: float) -> None:
        """Take note of the fresh accuracy of the step that has just been scored."""
        self.recent = [*self.recent, accuracy][-RECENT_STEPS:]


@dataclass
class DiscriminatorPass:
    """What came of the pass; the discriminator moves when `step` is called.

    Attributes:
        scores: of the rows of the fresh groups, before the update.
        has_gradients: whether there is something to move by.
        metrics: what is known so far.
    """

    scores: Scores
    has_gradients: bool
    metrics: Metrics
    engine: Engine[Scores]

    def clip_gradients(self) -> None:
        """Clip the gradients, if there are any.

        Raises:
            AlarmError: if they are not finite; nothing has been updated.
        """
        if self.has_gradients:
            self.metrics["discriminator/grad_norm"] = self.engine.clip_gradients()

    def step(self, learning_rate: float) -> None:
        """Move the discriminator, unless it rests."""
        if self.has_gradients:
            self.metrics["detail/discriminator_learning_rate"] = learning_rate
            self.engine.step(learning_rate)


@dataclass
class DiscriminatorTrainer:
    """Makes the passes of a stage.

    Attributes:
        engine: the discriminator's.
        config: its settings.
        teachers: whose accuracies are logged one by one.
        schedule: when it moves.
        replay: groups of earlier steps.
    """

    engine: Engine[Scores]
    config: DiscriminatorConfig
    teachers: Sequence[str]
    schedule: UpdateSchedule
    replay: Replay

    def __call__(self, step: int, fresh: list[Group], *, rests: bool) -> DiscriminatorPass:
        """Score the fresh groups; unless it rests, add the gradients of the loss on them and on earlier ones.

        Args:
            step: of the stage.
            fresh: as the discriminator reads them.
            rests: whether an alarm lets it take no step.

        Raises:
            AlarmError: if the loss is not finite; nothing has been updated.
        """
        is_trained = self.schedule.moves(step) and not rests
        metrics: Metrics = {}
        if is_trained:
            groups = [*fresh, *self.replay.drawn(step)]
            objective = discriminator_objective(groups, self.config.loss, centring=self.config.centring)
            scores, metrics["discriminator/loss"] = self.engine.forward_backward(groups, objective)
            scores = Scores(scores.values[: num_rows(fresh)])
        else:
            scores = self.engine.forward(fresh)
        self.replay.keep(step, fresh)
        metrics |= discriminator_metrics(scores, fresh) | self._by_teacher(scores, fresh)
        self.schedule.note(metrics["discriminator/accuracy"])
        if rests or not self.schedule.is_vanilla:
            metrics["detail/discriminator_skipped"] = float(not is_trained)
        return DiscriminatorPass(scores, is_trained, metrics, self.engine)

    def _by_teacher(self, scores: Scores, groups: Sequence[Group]) -> Metrics:
        """How well the samples are told from each teacher's responses."""
        pairs = list(zip(scores_by_group(scores, groups), groups, strict=True))
        metrics: Metrics = {}
        for teacher in self.teachers:
            own = [
                GroupScores(scored.teachers[[b.teacher == teacher for b in group.teachers]], scored.students)
                for scored, group in pairs
            ]
            if any(len(scored.teachers) for scored in own):
                metrics[f"detail/accuracy/{teacher}"], _ = accuracy_and_gap(own)
        return metrics
