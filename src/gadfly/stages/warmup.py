"""Warmup: the student imitates the teacher while the discriminator learns to tell its fresh samples
from the teacher's responses.

    discriminator_only_steps     discriminator on samples of the untouched student
    the epochs                   one SFT step of the student, one of the discriminator on fresh samples
    discriminator_final_steps    discriminator on samples of the finished student

Source: arXiv 2511.10643, Algorithm 1 and appendix A.2.
"""

from dataclasses import dataclass

from gadfly.checkpoint import checkpoint_steps, latest_checkpoint
from gadfly.config import WarmupConfig
from gadfly.engine import scheduled_learning_rate
from gadfly.objectives import sft_objective
from gadfly.stages.adversaries import open_adversaries
from gadfly.stages.diagnostics import (
    Metrics,
    group_metrics,
    ranking_metrics,
    rollout_metrics,
    student_scores,
)
from gadfly.stages.remedies import begin_stage, reopened
from gadfly.stages.run import Run
from gadfly.stages.sft import discriminator_lm


@dataclass(frozen=True)
class Plan:
    """Who moves at which step, counted from 1.

    Example:
        >>> plan = Plan(only=2, joint=4, final=1, discriminator_every=2)
        >>> [plan.moves(step) for step in (1, 3, 4, 7)]
        [(False, True), (True, False), (True, True), (False, True)]
    """

    only: int
    joint: int
    final: int
    discriminator_every: int

    @property
    def total(self) -> int:
        """All steps of the stage."""
        return self.only + self.joint + self.final

    def student_step(self, step: int) -> int:
        """The student's own step number, for its learning-rate schedule."""
        return step - self.only

    def batch(self, step: int) -> int:
        """Which batch a step works on: the student's first is the first of the epoch."""
        return step if step <= self.only else self.student_step(step)

    def moves(self, step: int) -> tuple[bool, bool]:
        """Whether the student moves, and whether the discriminator does."""
        own = self.student_step(step)
        if not 1 <= own <= self.joint:
            return False, True
        return True, self.discriminator_every > 0 and own % self.discriminator_every == 0


@reopened("warmup")
def warmup(run: Run) -> None:
    """Train student and discriminator up to where the adversarial game can start."""
    recipe, settings = run.recipe, run.recipe.warmup
    if not begin_stage(run, "warmup", run.stage_settings("discriminator", "warmup")):
        return
    base = None
    stage = run.folder.stage("warmup")
    has_begun = bool(run.processes.once("the checkpoints of warmup", lambda: checkpoint_steps(stage)))
    # A checkpoint has a discriminator that began from the language model.
    if recipe.discriminator.lm_steps > 0 and not has_begun:
        discriminator_lm(run)
        learned = latest_checkpoint(run.folder.stage("discriminator-lm"), run.processes)
        assert learned is not None, "a finished stage has a checkpoint"
        base = learned.path / "student"
    players = open_adversaries(
        run,
        "warmup",
        settings,
        temperature=1.0,
        start=None,
        discriminator_base=base,
    )
    plan = _plan(settings, players.batches.total_steps(settings.epochs, settings.max_steps))
    student, train_discriminator = players.student, players.discriminator_trainer()
    discriminator_rate = settings.discriminator_learning_rate or recipe.discriminator.learning_rate

    with players.training_loop(plan.total, settings) as loop:
        for step in loop:
            student_moves, discriminator_moves = plan.moves(step)
            batch = players.batches(plan.batch(step))
            metrics: Metrics = {}
            judged = None
            if discriminator_moves:
                rollout = players.rollout(step, settings.group_size, batch)
                loop.mark("sample")
                # Beside a student that stands still, no alarm would end by its resting.
                rests = student_moves and loop.discriminator_rests
                judged = train_discriminator(step, rollout.as_read, rests=rests)
                sample_scores = student_scores(judged.scores, rollout.as_read)
                metrics |= group_metrics(sample_scores, rollout.groups)
                if loop.is_evaluated(step):
                    metrics |= ranking_metrics(sample_scores, rollout.groups)
                metrics |= rollout_metrics(rollout.groups)
                judged.clip_gradients()
                loop.mark("discriminator")
            if student_moves:
                teachers = [example.group for example in batch]
                _, metrics["student/loss"] = student.engine.forward_backward(
                    teachers, sft_objective(teachers)
                )
                metrics["student/grad_norm"] = student.engine.clip_gradients()
                metrics["detail/learning_rate"] = student_rate = scheduled_learning_rate(
                    settings.learning_rate,
                    settings.learning_rate_schedule,
                    plan.student_step(step),
                    plan.joint,
                )
                student.step(student_rate)
                loop.mark("student")
            if judged is not None:
                judged.step(discriminator_rate)
                metrics |= judged.metrics
            loop.log(metrics)


def _plan(settings: WarmupConfig, joint: int) -> Plan:
    return Plan(
        settings.discriminator_only_steps,
        joint,
        settings.discriminator_final_steps,
        settings.discriminator_every,
    )
