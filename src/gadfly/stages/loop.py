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
from collections.abc import Callable, Iterator
from typing import Any

from gadfly.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    point,
    prune_checkpoints,
    remove_unfinished,
)
from gadfly.config import Training
from gadfly.errors import AlarmError
from gadfly.stages.diagnostics import Metrics
from gadfly.stages.run import Run
from gadfly.stages.saving import CheckpointWriter, Engines, Snapshot

logger = logging.getLogger(__name__)

# What the console line of a step shows, if the step has it: (metric, text around the value).
_SHOWN = (
    ("discriminator/accuracy", "told apart {:.0%}"),
    ("discriminator/score_gap", "gap {:.2f}"),
    ("student/loss", "loss {:.3f}"),
    ("student/kl_nats", "kl {:.3f}"),
    ("rollout/response_tokens", "{:.0f} tok"),
    ("rollout/finished_fraction", "finished {:.0%}"),
)


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
        evaluate: Callable[[], tuple[Metrics, list[dict[str, Any]]]] | None,
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

    def __iter__(self) -> Iterator[int]:
        """The steps that are left, counted from 1; evaluates and saves between them."""
        if self.step == 0 and self.last_saved is None:
            self._evaluate_now()
        for step in range(self.step + 1, self.total_steps + 1):
            self.step = step
            self._run.processes.place = f"{self._stage} step {step}"
            self._marked = time.perf_counter()
            yield step
            is_last = step == self.total_steps
            score = None
            if is_last or step % self._training.evaluate_every == 0:
                score = self._evaluate_now()
            if is_last or step % self._training.save_every == 0:
                self._save(score)

    def mark(self, phase: str) -> None:
        """Book the time since the last mark, or since the step began, under `time/PHASE_seconds`."""
        now = time.perf_counter()
        self._times[f"time/{phase}_seconds"] = now - self._marked
        self._marked = now

    def log(self, metrics: Metrics) -> None:
        """Write a step's metrics to `metrics.jsonl`, the trackers and the console."""
        row = {
            "stage": self._stage,
            "step": self.step,
            **metrics,
            **self._times,
            "time/unix": time.time(),
        }
        self._run.folder.append_rows("metrics.jsonl", [row])
        self._track(metrics)
        logger.info(self._line(metrics), extra={"live": True, "last": self.step == self.total_steps})
        self._times = {}

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Write samples to `samples.jsonl`."""
        named = [{"stage": self._stage, "step": self.step, **row} for row in rows]
        self._run.folder.append_rows("samples.jsonl", named)

    def is_evaluated(self, step: int) -> bool:
        """Whether the loop evaluates after this step; samples are worth keeping then."""
        return step in (1, self.total_steps) or step % self._training.evaluate_every == 0

    def forget_later_rows(self) -> None:
        """Drop the rows of this stage that a killed start logged beyond the checkpoint it resumes from."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            self._run.folder.keep_rows(
                name,
                lambda row: (
                    row["stage"] != self._stage or (self.last_saved is not None and row["step"] <= self.step)
                ),
            )

    def _evaluate_now(self) -> float | None:
        if self._evaluate is None:
            return None
        metrics, samples = self._evaluate()
        row = {"stage": self._stage, "step": self.step, **metrics, "time/unix": time.time()}
        self._run.folder.append_rows("metrics.jsonl", [row])
        self.log_samples(samples)
        self._track(metrics)
        figures = "  ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in metrics.items())
        logger.info("%s %d/%d  held-out: %s", self._stage, self.step, self.total_steps, figures)
        return metrics["evaluation/rouge_l"]

    def _save(self, score: float | None) -> None:
        if score is not None and (self._best is None or score > self._best[1]):
            self._best = [self.step, score]
        states = [engine.optimizer_state().values() for engine in self._engines.values()]
        held = [value for state in states for value in state]
        # Weights and two moments of each model, and as much again for what else the write needs.
        self._run.folder.check_free_space(2 * sum(value.numel() * value.element_size() for value in held))
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
        shown = "  ".join(text.format(metrics[name]) for name, text in _SHOWN if name in metrics)
        minutes, seconds = divmod(round(left), 60)
        return f"{self._stage} {self.step}/{self.total_steps}  {shown}  {minutes}:{seconds:02d} left"


@contextlib.contextmanager
def training_loop(
    run: Run,
    stage: str,
    *,
    total_steps: int,
    training: Training,
    engines: Engines,
    snapshot: Snapshot,
    evaluate: Callable[[], tuple[Metrics, list[dict[str, Any]]]] | None,
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
        evaluate: metrics and sample rows on held-out prompts; None without held-out prompts.
        resumed_from: where an earlier start got to.

    Raises:
        AlarmError: if a step's loss or gradient is not finite, with the step and the last good
            checkpoint.
    """
    loop = TrainingLoop(run, stage, total_steps, training, engines, snapshot, evaluate, resumed_from)
    # A kill may have come amid a save, or between a save and what follows it.
    loop.tidy()
    loop.forget_later_rows()
    if resumed_from:
        logger.info("%s: going on after step %d of %d", stage, resumed_from.step, total_steps)
    try:
        yield loop
        loop.finish()
    except AlarmError as alarm:
        saved = "none yet" if loop.last_saved is None else f"step {loop.last_saved}"
        raise AlarmError(
            f"{stage} step {loop.step}: {alarm}; nothing was updated. Last good checkpoint: {saved}. "
            f"Lower the learning rate or max_grad_norm and run again from there."
        ) from alarm
    run.folder.finish(stage, steps=total_steps, seconds=round(loop.seconds, 3))
