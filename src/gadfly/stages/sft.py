"""SFT on the teacher's responses. One loop, three users: the SeqKD baseline, its equal-time twin, and the
discriminator's language model.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from gadfly.checkpoint import checkpoint_steps, latest_checkpoint
from gadfly.config import Optimizer, Training
from gadfly.engine import scheduled_learning_rate
from gadfly.errors import CheckpointError, RunFolderError
from gadfly.objectives import sft_objective
from gadfly.run_folder import Record
from gadfly.stages.evaluation import Evaluation
from gadfly.stages.examples import Batches, training_examples
from gadfly.stages.loop import training_loop
from gadfly.stages.remedies import begin_stage, reopened
from gadfly.stages.roles import open_shared_base, open_student, restore_optimizer
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)


@reopened("seqkd")
def seqkd(run: Run) -> None:
    """The baseline: SFT on the teacher's responses, no KL term (paper: SeqKD)."""
    settings = run.stage_settings("seqkd")
    del settings["seqkd"]["equal_time_learning_rate"]
    if not begin_stage(run, "seqkd", settings):
        return
    fine_tune(run, "seqkd", run.recipe.student.model, run.recipe.student, run.recipe.seqkd)


@reopened("seqkd-equal-time")
def seqkd_equal_time(run: Run) -> None:
    """The same for as many seconds as warmup and gad took together.

    The seconds become steps once, by the pace of the finished `seqkd` stage's steps; the steps are kept, so
    that a resumed run ends where an undisturbed one does.
    """
    stage = "seqkd-equal-time"
    # What gad began from elsewhere took its time there.
    needed = ("seqkd", "gad") if run.gad_begins_at is not None else ("seqkd", "warmup", "gad")
    if missing := [name for name in needed if not run.folder.is_done(name)]:
        raise CheckpointError(f"{stage}: needs the times of {', '.join(missing)}; run them first")
    last = latest_checkpoint(run.folder.stage("gad"), run.processes)
    assert last is not None, "a finished stage has a checkpoint"
    _refuse_times_of_another_gad(run, stage, last.digest)
    if not begin_stage(run, stage, {**run.stage_settings("seqkd"), "as_long_as": last.digest}):
        return
    plan = run.folder.read_json(f"{stage}/plan.json")
    if not plan:
        stages = run.folder.read_json("summary.json")["stages"]
        arms = [name for name in ("discriminator-lm", *needed[1:]) if name in stages]
        # What was taken back took its time too.
        seconds = sum(stages[name]["seconds"] + stages[name].get("lost_seconds", 0.0) for name in arms)
        done, taken = stages["seqkd"]["steps"], stages["seqkd"]["seconds"]
        # What it takes to open and to close a stage, this one takes too.
        steps = done + round((seconds - taken) / _pace(run.folder.rows("metrics.jsonl"), taken))
        plan = {"seconds": seconds, "steps": max(1, steps)}
        run.folder.write_json(f"{stage}/plan.json", plan)
    before = " and ".join(needed[1:])
    logger.info("%s: %d steps for the %.0f seconds of %s", stage, plan["steps"], plan["seconds"], before)
    if "warmup" not in needed:
        logger.warning("%s: what gad began from took longer; that is not counted, in GAD's favour", stage)
    settings = run.recipe.seqkd
    training = settings.model_copy(
        update={
            "max_steps": plan["steps"],
            "learning_rate": settings.equal_time_learning_rate or settings.learning_rate,
        }
    )
    fine_tune(run, stage, run.recipe.student.model, run.recipe.student, training)


def _pace(rows: Sequence[Record], taken: float) -> float:
    """Seconds of a step of `seqkd`, with its share of evaluations and checkpoints.

    Args:
        rows: all of `metrics.jsonl`.
        taken: seconds that the stage took while it ran.
    """
    steps = [row for row in rows if row["stage"] == "seqkd" and "time/step_seconds" in row]
    between = steps[-1]["time/unix"] - steps[0]["time/unix"]
    # Longer than it ran: it was stopped in between, and nobody knows for how long.
    if len(steps) > 1 and between < taken:
        return float(between / (len(steps) - 1))
    return float(sum(row["time/step_seconds"] for row in steps) / len(steps))


def _refuse_times_of_another_gad(run: Run, stage: str, gad: str) -> None:
    begun = run.folder.read_json(f"{stage}/stage.json").get("settings") or {}
    folder = run.folder.stage(stage)
    if begun.get("as_long_as", gad) != gad and checkpoint_steps(folder):
        raise RunFolderError(
            f"{folder}: trained for as long as a gad that has been trained again since, so this baseline has "
            f"to be too: delete that folder and run the same command again"
        )


@reopened("discriminator-lm")
def discriminator_lm(run: Run) -> None:
    """Teach the discriminator's base model the teacher's language, before it learns to tell."""
    config = run.recipe.discriminator
    stage = "discriminator-lm"
    settings = run.stage_settings("discriminator")
    # What the discriminator does later is nothing to its language model.
    for later in ("reads", "loss", "learning_rate", "centring"):
        del settings["discriminator"][later]
    settings["learning_rate_schedule"] = run.recipe.warmup.learning_rate_schedule
    if not begin_stage(run, stage, settings):
        return
    training = run.recipe.warmup.model_copy(
        update={
            "learning_rate": config.lm_learning_rate,
            "batch_prompts": config.lm_batch_prompts,
            "max_steps": config.lm_steps,
        }
    )
    fine_tune(run, stage, config.model or run.recipe.student.model, config, training)


def fine_tune(run: Run, stage: str, model: str, optimizer: Optimizer, training: Training) -> None:
    """Train a model on the teacher's responses, each back-propagated once a step."""
    recipe = run.recipe
    resumed = latest_checkpoint(run.folder.stage(stage), run.processes)
    source = resumed.path / "student" if resumed else model
    shared = open_shared_base(recipe)
    student = open_student(run, source, temperature=1.0, optimizer=optimizer, shared=shared)
    if resumed:
        restore_optimizer(run, student.engine, resumed, "student")
    examples, valid = training_examples(run, student.model, student.renderer)
    evaluation = Evaluation(valid, student, recipe.sampling.max_response_tokens) if valid else None
    batches = Batches(examples, training.batch_prompts, recipe.seed, stage)
    total = batches.total_steps(training.epochs, training.max_steps)

    def snapshot(is_copy: bool) -> Callable[[Path], None]:
        write_student = student.snapshot(is_copy=is_copy)
        return lambda folder: write_student(folder / "student")

    with training_loop(
        run,
        stage,
        total_steps=total,
        training=training,
        engines={"student": student.engine},
        snapshot=snapshot,
        evaluate=evaluation,
        resumed_from=resumed,
    ) as loop:
        for step in loop:
            groups = [example.group for example in batches(step)]
            _, loss = student.engine.forward_backward(groups, sft_objective(groups))
            norm = student.engine.clip_gradients()
            learning_rate = scheduled_learning_rate(
                training.learning_rate, training.learning_rate_schedule, step, total
            )
            student.step(learning_rate)
            loop.mark("step")
            loop.log(
                {
                    "student/loss": loss,
                    "student/grad_norm": norm,
                    "detail/learning_rate": learning_rate,
                }
            )
