"""What every training stage does around its steps: resume, log, evaluate, save, tell the time left.

    with training_loop(...) as loop:
        for step in loop:
            ...                     # the step itself
            loop.log(metrics)

A stage that was killed starts again after its newest checkpoint; rows it had logged beyond that are
dropped, since it will write the same ones again.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from gadfly.alarms import Circumstances
from gadfly.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    point,
    prune_checkpoints,
    remove_unfinished,
)
from gadfly.config import Training
from gadfly.engine.movement import Movement
from gadfly.errors import AlarmError
from gadfly.stage_settings import differences
from gadfly.stages.alarm_actions import StageAlarms, Stopped, way_on
from gadfly.stages.diagnostics import Metrics
from gadfly.stages.evaluation import Evaluation
from gadfly.stages.remedies import taken_back
from gadfly.stages.run import Run, environment
from gadfly.stages.saving import CheckpointWriter, Engines, Snapshot
from gadfly.stages.stage_start import tell_begun, tell_resumed
from gadfly.stages.step_line import step_line

logger = logging.getLogger(__name__)


class TrainingLoop:
    """Iterates over the steps that are left; see `training_loop`."""

    def __init__(
        self,
        run: Run,
        stage: str,
        total_steps: int,
        training: Training,
        engines: Engines,
        snapshot: Snapshot,
        evaluate: Evaluation | None,
        resumed_from: Checkpoint | None,
    ):
        self.total_steps = total_steps
        self.step = resumed_from.step if resumed_from else 0
        self.last_saved = self.step if resumed_from else None
        self._run = run
        self._stage = stage
        self._folder = run.folder.stage(stage)
        self._training = training
        self._engines = engines
        self._writer = CheckpointWriter(
            self._folder,
            engines,
            snapshot,
            run.processes,
            in_background=run.recipe.checkpoints.in_background,
        )
        self._evaluate = evaluate
        self._movements = {role: Movement(engine.model) for role, engine in engines.items()}
        self._alarms = StageAlarms(run, stage, _circumstances(run, training, engines, evaluate))
        facts = resumed_from.facts if resumed_from else {}
        self._best: list[float] | None = facts.get("best")
        self._seconds_before = float(facts.get("seconds", 0.0))
        self._started = self._marked = time.perf_counter()
        self._first_step = self.step
        self._times: Metrics = {}

    @property
    def _best_step(self) -> int | None:
        return int(self._best[0]) if self._best else None

    @property
    def seconds(self) -> float:
        """Wall time of the stage so far, that of earlier starts up to their last checkpoint included."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def discriminator_rests(self) -> bool:
        """Whether an alarm stands, as the step begins, that lets the discriminator take no step."""
        return self._alarms.rests

    def __iter__(self) -> Iterator[int]:
        """The steps that are left, counted from 1; evaluates and saves between them, and acts on alarms."""
        if self.step == 0 and self.last_saved is None:
            self._evaluate_now()
        self._act_on_alarms()
        for step in range(self.step + 1, self.total_steps + 1):
            self.step = step
            self._run.processes.place = f"{self._stage} step {step}"
            self._marked = time.perf_counter()
            yield step
            is_last = step == self.total_steps
            score = None
            if is_last or step % self._training.evaluate_every == 0:
                score = self._evaluate_now()
            is_due = is_last or step % self._training.save_every == 0 or self._alarms.stops
            # A kill before the way back is noted has to leave the step, and its alarm, to be done again.
            if is_due and not self._alarms.goes_back:
                self._save(score)
            self._act_on_alarms()

    def mark(self, phase: str) -> None:
        """Book the time since the last mark, or since the step began, under `time/PHASE_seconds`."""
        now = time.perf_counter()
        self._times[f"time/{phase}_seconds"] = now - self._marked
        self._marked = now

    def log(self, metrics: Metrics) -> None:
        """Write a step's metrics to `metrics.jsonl`, the trackers and the console, and look for alarms."""
        self._run.processes.note("what has moved")
        metrics = metrics | self._still_fractions(metrics)
        row = {"stage": self._stage, "step": self.step, **metrics, **self._times, "time/unix": time.time()}
        self._run.folder.append_rows("metrics.jsonl", [row])
        self._track(metrics)
        logger.info(self._line(metrics), extra={"live": True, "last": self.step == self.total_steps})
        self._times = {}
        self._alarms.see(row)

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Write samples to `samples.jsonl`."""
        named = [{"stage": self._stage, "step": self.step, **row} for row in rows]
        self._run.folder.append_rows("samples.jsonl", named)

    def is_evaluated(self, step: int) -> bool:
        """Whether a step is looked at closely, samples and all: the first, and those before evaluations."""
        return step in (1, self.total_steps) or step % self._training.evaluate_every == 0

    def forget_later_rows(self) -> None:
        """Drop the rows of this stage that a killed start logged beyond the checkpoint it resumes from."""
        for name in ("metrics.jsonl", "samples.jsonl", "alarms.jsonl"):
            self._run.folder.keep_rows(
                name,
                lambda row: (
                    row["stage"] != self._stage or (self.last_saved is not None and row["step"] <= self.step)
                ),
            )
        self._alarms.recall()

    def answer(self, error: AlarmError) -> None:
        """Do what the recipe wants about an alarm that came as an error amid the step."""
        self._alarms.answer(error, self.step, self.seconds)

    def _act_on_alarms(self) -> None:
        self._alarms.act(before=self.finish, seconds=self.seconds)

    def _still_fractions(self, metrics: Metrics) -> Metrics:
        """Of each model that took a step, the share of its trained tensors that did not move."""
        stepped = {role for role in self._movements if f"{role}/grad_norm" in metrics}
        return {
            f"detail/still_fraction/{role}": self._movements[role].since_last() for role in sorted(stepped)
        }

    def _evaluate_now(self) -> float | None:
        if self._evaluate is None:
            return None
        # It looks back on what is saved, which must not depend on how fast that is written.
        self.finish()
        # Large models take minutes for it.
        place = f"{self._stage} {self.step}/{self.total_steps}"
        logger.info("%s  asking held-out prompts", place, extra={"live": True, "last": False})
        metrics, samples = self._evaluate()
        row = {"stage": self._stage, "step": self.step, **metrics, "time/unix": time.time()}
        self._run.folder.append_rows("metrics.jsonl", [row])
        self.log_samples(samples)
        self._track(metrics)
        shown = {name: value for name, value in metrics.items() if not name.startswith("detail/")}
        figures = "  ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in shown.items())
        logger.info("%s  held-out: %s", place, figures)
        self._alarms.see(row)
        return metrics["evaluation/rouge_l"]

    def _save(self, score: float | None) -> None:
        if score is not None and (self._best is None or score > self._best[1]):
            self._best = [self.step, score]
        states = [engine.optimizer_state().values() for engine in self._engines.values()]
        tensors = [value for state in states for value in state]
        # Weights and two moments of each model, and as much again for what else the write needs.
        self._run.folder.check_free_space(2 * sum(value.numel() * value.element_size() for value in tensors))
        step, best_step = self.step, self._best_step

        def then() -> None:
            self.last_saved = step
            if self._run.processes.rank == 0:
                self._tidy(best_step)

        self._writer.save(step, {"best": self._best, "seconds": self.seconds}, then)

    def finish(self) -> None:
        """Let the last checkpoint come to its end."""
        self._writer.wait()

    def tidy(self) -> None:
        """Delete what a killed start left behind, and put the links right."""

        def clean() -> None:
            remove_unfinished(self._folder)
            self._tidy(self._best_step)

        self._run.processes.once("checkpoints", clean)

    def _tidy(self, best: int | None) -> None:
        """Point `best` at the best checkpoint and delete those that are neither new nor best."""
        checkpoints = self._run.recipe.checkpoints
        best_step = best if checkpoints.keep_best else None
        # It may be gone: deleted by hand, or pruned before the stage went back.
        if best_step in checkpoint_steps(self._folder):
            point(self._folder / "best", self._folder / f"step-{best_step:06d}")
        prune_checkpoints(self._folder, checkpoints.keep_last, best_step)

    def _track(self, metrics: Metrics) -> None:
        for tracker in self._run.trackers:
            tracker.log(self._stage, self.step, metrics)

    def _line(self, metrics: Metrics) -> str:
        done = self.step - self._first_step
        left = (time.perf_counter() - self._started) / done * (self.total_steps - self.step)
        return step_line(self._stage, self.step, self.total_steps, metrics, left)


@contextlib.contextmanager
def training_loop(
    run: Run,
    stage: str,
    *,
    total_steps: int,
    training: Training,
    engines: Engines,
    snapshot: Snapshot,
    evaluate: Evaluation | None,
    resumed_from: Checkpoint | None,
) -> Iterator[TrainingLoop]:
    """The loop of a stage; marks the stage as done when its steps are.

    Args:
        run: the open run.
        stage: its name and folder.
        total_steps: steps in all, those before a resume included.
        training: how often to save and evaluate.
        engines: by role, whose optimisers go into the checkpoints.
        snapshot: the models as they are now, as a function that fills a checkpoint folder with them.
        evaluate: on held-out prompts; None without any.
        resumed_from: where an earlier start got to.

    Raises:
        AlarmError: a step's loss or gradient is not finite, or an alarm stands that the recipe wants to stop
            at; with the step and the last good checkpoint.
        GoBack: the stage is to be opened again, from before an alarm.
    """
    begun, now = run.folder.read_json(f"{stage}/stage.json"), environment()
    made_by = begun.get("environment") or now
    run.folder.write_json(f"{stage}/stage.json", begun | {"total_steps": total_steps, "environment": made_by})
    loop = TrainingLoop(run, stage, total_steps, training, engines, snapshot, evaluate, resumed_from)
    # A kill may have come amid a save, or between a save and what follows it.
    loop.tidy()
    loop.forget_later_rows()
    if resumed_from:
        tell_resumed(stage, resumed_from.step, total_steps, differences(made_by, now))
    else:
        tell_begun(stage, total_steps, training, evaluate.num_prompts if evaluate else 0)
    try:
        yield loop
        loop.finish()
    except Stopped:
        raise
    except AlarmError as alarm:
        loop.finish()
        loop.answer(alarm)
        saved = "none yet" if loop.last_saved is None else f"step {loop.last_saved}"
        raise AlarmError(
            f"{stage} step {loop.step}: {alarm}. Last good checkpoint: {saved}. "
            f"The same command goes on from there{way_on(run, stage, alarm)}",
            alarm.alarm,
        ) from alarm
    run.folder.finish(stage, steps=total_steps, seconds=round(loop.seconds, 3), **taken_back(run, stage))


def _circumstances(
    run: Run, training: Training, engines: Engines, evaluate: Evaluation | None
) -> Circumstances:
    """What an alarm has to know of a stage."""
    types = {run.recipe.student.dtype, *(engine.precision for engine in engines.values())}
    return Circumstances(
        window=run.recipe.alarms.window,
        group_size=getattr(training, "group_size", 0),
        held_out=evaluate.num_prompts if evaluate else 0,
        is_half="bfloat16" in types,
    )
