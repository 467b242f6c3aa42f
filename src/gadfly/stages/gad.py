"""GAD: the student is trained by GRPO against a discriminator that learns beside it.

The loop is Algorithm 1 of the paper (arXiv 2511.10643), GAD training stage:

    repeat
      for each batch (x, y_t) ~ T:
        sample student responses G(x)
        update G using D(G(x)) as RL reward
        update D with Bradley-Terry loss

Within a step the reward is the score before the discriminator's update, and that scoring pass is
also the discriminator's training pass. One update each.
"""

import logging
from pathlib import Path
from typing import Any

from gadfly.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    drop_checkpoints_after,
    latest_checkpoint,
    open_checkpoint,
)
from gadfly.engine import scheduled_learning_rate
from gadfly.errors import CheckpointError
from gadfly.objectives import grpo_objective
from gadfly.replay import Replay
from gadfly.stages.adversaries import Adversaries, open_adversaries, sample_rows
from gadfly.stages.diagnostics import (
    group_metrics,
    policy_metrics,
    ranking_metrics,
    rollout_metrics,
    student_scores,
)
from gadfly.stages.remedies import GoBack, RemediedRun, begin_stage, forget_remedies_after, reopened
from gadfly.stages.rewards import Rewards
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)


@reopened("gad")
def gad(run: Run) -> None:
    """Train student and discriminator against each other, from warmup's end."""
    recipe, settings = run.recipe, run.recipe.gad
    advantages_of = Rewards(run)
    players = _open(run)
    if players is None:
        return
    student = players.student
    train_discriminator = players.discriminator_trainer(
        every=settings.discriminator_every, rests_above=settings.discriminator_rests_above
    )
    reference = players.reference() if settings.kl_coefficient > 0 else None
    discriminator_rate = settings.discriminator_learning_rate or recipe.discriminator.learning_rate
    total = players.batches.total_steps(settings.epochs, settings.max_steps)

    with players.training_loop(total, settings) as loop:
        for step in loop:
            batch = players.batches(step)
            rollout = players.rollout(step, settings.group_size, batch)
            loop.mark("sample")

            # One pass of D: its scores are the reward, and its Bradley-Terry loss leaves its gradients.
            judged = train_discriminator(step, rollout.as_read, rests=loop.discriminator_rests)
            rewards = student_scores(judged.scores, rollout.as_read)
            advantages, shares = advantages_of(rewards, batch, rollout.groups)
            loop.mark("discriminator")

            student_groups = [group.only_students() for group in rollout.groups]
            ref_logprobs = reference.forward(student_groups) if reference else None
            loop.mark("reference")

            student_objective = grpo_objective(
                student_groups,
                advantages.flatten(),
                ref_logprobs,
                clip_range=settings.clip_range,
                kl_coefficient=settings.kl_coefficient,
            )
            logprobs, student_loss = student.engine.forward_backward(student_groups, student_objective)

            # Both gradients are checked before either model moves.
            judged.clip_gradients()
            student_norm = student.engine.clip_gradients()
            judged.step(discriminator_rate)
            student_rate = scheduled_learning_rate(
                settings.learning_rate, settings.learning_rate_schedule, step, total
            )
            student.step(student_rate)
            loop.mark("student")

            loop.log(
                judged.metrics
                | shares
                | {
                    "student/loss": student_loss,
                    "student/grad_norm": student_norm,
                    "detail/learning_rate": student_rate,
                }
                | policy_metrics(logprobs, ref_logprobs, student_groups, rollout.samples)
                | group_metrics(rewards, rollout.groups)
                | (ranking_metrics(rewards, rollout.groups) if loop.is_evaluated(step) else {})
                | rollout_metrics(rollout.groups)
            )
            if loop.is_evaluated(step):
                loop.log_samples(sample_rows(rollout, batch, judged.scores))


def _open(run: Run) -> Adversaries | None:
    """Both players where the stage starts or goes on; None if it is done."""
    settings = run.recipe.gad
    begins_elsewhere = run.gad_begins_at is not None
    start = run.processes.once("the start of gad", lambda: _start(run.alone()), is_patient=True)
    left = begin_stage(run, "gad", {**run.stage_settings("discriminator", "gad"), "start": start.digest})
    if begins_elsewhere:
        noted: dict[str, Any] = {"began_at": str(start.path.resolve())}
        if not settings.starts_elsewhere:
            # It is so because of what was trained, of which there may soon be no trace left.
            noted["has_trained"] = True
        run.folder.write_json("gad/stage.json", run.folder.read_json("gad/stage.json") | noted)
    went_back = run.processes.once("gad.start_from", lambda: _go_back(run.alone()))
    if went_back and isinstance(run, RemediedRun):
        # It has remedies that are noted no more.
        raise GoBack
    if not (went_back or left):
        return None
    return open_adversaries(
        run,
        "gad",
        settings,
        temperature=run.recipe.sampling.temperature,
        start=start,
        replay=Replay(settings.replay, settings.replay_steps, run.recipe.seed),
    )


def _start(run: Run) -> Checkpoint:
    """The checkpoint the stage starts from: warmup's end, or the folder `gad.start_from` names or named."""
    # Once begun elsewhere, that need not be named again: a step to go back to may have taken its place.
    if (elsewhere := run.gad_begins_at) is not None:
        return open_checkpoint(Path(elsewhere))
    warmup = latest_checkpoint(run.folder.stage("warmup"))
    if warmup is None or not run.folder.is_done("warmup"):
        raise CheckpointError(
            f"gad needs a discriminator: warmup under {run.folder.path} is not done. "
            f"Run `gadfly warmup RECIPE` first, or name a checkpoint with gad.start_from."
        )
    return warmup


def _go_back(run: Run) -> bool:
    """Go back if `gad.start_from` is a step of this stage. Returns whether it did.

    Once, since the same command also goes on after a kill; again after the stage was begun without it.
    """
    step, stage = run.recipe.gad.start_from, run.folder.stage("gad")
    begun = run.folder.read_json("gad/stage.json")
    went_back_to = begun.pop("went_back_to", None)
    if isinstance(step, str):
        if went_back_to is not None:
            run.folder.write_json("gad/stage.json", begun)
        return False
    if went_back_to == step:
        if begun.get("done"):
            logger.info(
                "gad: went back to step %d before, and on to the end; to go back again, run it once without "
                "gad.start_from first",
                step,
            )
        return False
    if step != 0 and step not in checkpoint_steps(stage):
        kept = ", ".join(map(str, checkpoint_steps(stage))) or "none"
        raise CheckpointError(f"gad.start_from = {step}: no such checkpoint in {stage}; kept steps: {kept}")
    drop_checkpoints_after(stage, step)
    forget_remedies_after(run.folder, "gad", step)
    run.folder.forget("gad")
    begun.pop("lost_seconds", None)
    run.folder.write_json("gad/stage.json", {**begun, "done": False, "went_back_to": step})
    return True
