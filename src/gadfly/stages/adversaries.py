"""Student and discriminator side by side, as warmup and gad need them: opened, sampled, saved together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadfly.checkpoint import Checkpoint, latest_checkpoint
from gadfly.config import Training
from gadfly.discriminator import Scores
from gadfly.engine import Engine
from gadfly.groups import Group
from gadfly.logprobs import Logprobs
from gadfly.lora import SharedBase
from gadfly.replay import Replay
from gadfly.samplers import Sample
from gadfly.stages.discriminator_step import RECENT_STEPS, DiscriminatorTrainer, UpdateSchedule
from gadfly.stages.evaluation import Evaluation, frozen_probe
from gadfly.stages.examples import Batches, Example, check_context, training_examples
from gadfly.stages.loop import TrainingLoop, training_loop
from gadfly.stages.roles import (
    DiscriminatorRole,
    StudentRole,
    open_discriminator,
    open_reference,
    open_shared_base,
    open_student,
    restore_optimizer,
)
from gadfly.stages.rollout import sample_groups
from gadfly.stages.run import Run

# Held-out responses stored with a saved discriminator, to be scored again when it is loaded.
_STORED_PROBES = 8
# Groups of a step kept for the report.
_SHOWN_GROUPS = 2


@dataclass(frozen=True)
class Rollout:
    """One step's fresh samples.

    Attributes:
        groups: teacher and student branches, in the student's tokens.
        as_read: the same as the discriminator reads them.
        samples: as they were drawn, with the sampler's log-probabilities.
    """

    groups: list[Group]
    as_read: list[Group]
    samples: list[list[Sample]]


@dataclass(frozen=True)
class Adversaries:
    """The two players of a stage, what they are adapters of (if they are), and the data they play on."""

    run: Run
    stage: str
    student: StudentRole
    discriminator: DiscriminatorRole
    shared: SharedBase | None
    batches: Batches
    valid: list[Example]
    replay: Replay
    start: Checkpoint | None
    resumed_from: Checkpoint | None

    def rollout(self, step: int, group_size: int, batch: list[Example]) -> Rollout:
        """Fresh samples of the student for the batch of a step."""
        sampling = self.run.recipe.sampling
        groups, samples = sample_groups(
            self.student.sampler,
            self.student.renderer,
            batch,
            group_size=group_size,
            temperature=sampling.temperature,
            max_response_tokens=sampling.max_response_tokens,
            seed=self.run.recipe.seed,
            purpose=f"{self.stage}/{step}",
        )
        return Rollout(groups, self.discriminator.view(groups, batch), samples)

    def discriminator_trainer(
        self, *, every: int = 1, rests_above: float | None = None
    ) -> DiscriminatorTrainer:
        """What scores and trains the discriminator in this stage; see `UpdateSchedule` for when it rests."""
        recipe = self.run.recipe
        recent = [] if rests_above is None else self._recent_accuracies()
        return DiscriminatorTrainer(
            self.discriminator.engine,
            recipe.discriminator,
            list(recipe.data.teachers),
            UpdateSchedule(every, rests_above, recent),
            self.replay,
        )

    def reference(self) -> Engine[Logprobs]:
        """The student as the stage found it, frozen: what the KL term holds on to."""
        assert self.start is not None, "there is a student before it"
        return open_reference(
            self.run,
            self.start.path / "student",
            temperature=self.run.recipe.sampling.temperature,
            shared=self.shared,
            student=self.student,
        )

    def _recent_accuracies(self) -> list[float]:
        """The fresh accuracies of the last steps before a resume, the newest at the end."""
        last = self.resumed_from.step if self.resumed_from else 0
        return [
            row["discriminator/accuracy"]
            for row in self.run.folder.rows("metrics.jsonl")
            if row["stage"] == self.stage and row["step"] <= last and "discriminator/accuracy" in row
        ][-RECENT_STEPS:]

    @contextmanager
    def training_loop(self, total_steps: int, training: Training) -> Iterator[TrainingLoop]:
        """The loop of the stage, evaluating and saving both players."""
        with training_loop(
            self.run,
            self.stage,
            total_steps=total_steps,
            training=training,
            engines={"student": self.student.engine, "discriminator": self.discriminator.engine},
            snapshot=self._snapshot,
            evaluate=self._evaluation(),
            resumed_from=self.resumed_from,
        ) as loop:
            yield loop

    def _snapshot(self, is_copy: bool) -> Callable[[Path], None]:
        stored = (self.valid or self.batches(1))[:_STORED_PROBES]
        probe = self.discriminator.view([example.group for example in stored], stored)
        write_student = self.student.snapshot(is_copy=is_copy)
        write_discriminator = self.discriminator.snapshot(probe, is_copy=is_copy)
        write_replay = self.replay.snapshot()

        def write(folder: Path) -> None:
            write_student(folder / "student")
            write_discriminator(folder / "discriminator")
            write_replay(folder / "trainer")

        return write

    def _evaluation(self) -> Evaluation | None:
        if not self.valid:
            return None
        recipe = self.run.recipe
        probe = frozen_probe(
            self.run.folder.stage(self.stage) / "probe.jsonl",
            self.valid,
            self.student,
            self.discriminator,
            temperature=recipe.sampling.temperature,
            max_response_tokens=recipe.sampling.max_response_tokens,
            seed=recipe.seed,
            processes=self.run.processes,
            is_resumed=self.resumed_from is not None,
            start=self.start.path if self.start else None,
        )
        return Evaluation(
            self.valid, self.student, recipe.sampling.max_response_tokens, self.discriminator, probe
        )


def open_adversaries(
    run: Run,
    stage: str,
    training: Training,
    *,
    temperature: float,
    start: Checkpoint | None,
    discriminator_base: str | Path | None = None,
    replay: Replay | None = None,
) -> Adversaries:
    """Open both players, from where the stage stopped or from where it starts.

    Optimisers start afresh with each stage: their averages of one loss are no guide for the next.

    Args:
        run: the open run.
        stage: its name.
        training: the stage's section of the recipe.
        temperature: at which the student's log-probabilities are read.
        start: the stage before; None to start from the base models.
        discriminator_base: what to put a new head on where there is no stage before (default: the recipe's).
        replay: an empty store of groups; it is filled from the checkpoint where there is one. Default: none
            is kept.
    """
    recipe = run.recipe
    replay = replay or Replay(groups=0, steps=1, seed=recipe.seed)
    resumed = latest_checkpoint(run.folder.stage(stage), run.processes)
    origin = resumed or start
    source = origin.path / "student" if origin else recipe.student.model
    shared = open_shared_base(recipe)
    student = open_student(run, source, temperature=temperature, shared=shared)
    saved = origin.path / "discriminator" if origin else None
    base = discriminator_base or recipe.discriminator.model or recipe.student.model
    discriminator = open_discriminator(run, saved, base, shared, student)
    if resumed:
        restore_optimizer(run, student.engine, resumed, "student")
        restore_optimizer(run, discriminator.engine, resumed, "discriminator")
        replay.restore(resumed.path / "trainer")
    examples, valid = training_examples(run, student.model, student.renderer)
    read = [*examples, *valid]
    groups = [example.group for example in read]
    if recipe.discriminator.model not in (None, recipe.student.model):
        # Its tokens may be other and more.
        groups = discriminator.view(groups, read)
    cap = recipe.sampling.max_response_tokens
    check_context(discriminator.model.backbone, groups, cap, "discriminator")
    batches = Batches(examples, training.batch_prompts, recipe.seed, stage)
    return Adversaries(run, stage, student, discriminator, shared, batches, valid, replay, start, resumed)


def sample_rows(rollout: Rollout, batch: list[Example], scores: Scores) -> list[dict[str, Any]]:
    """The first groups of a step as rows for `samples.jsonl`: every response with its score."""
    rows, first = [], 0
    for group, example in list(zip(rollout.groups, batch, strict=True))[:_SHOWN_GROUPS]:
        values = scores.values[first : first + len(group.branches)].tolist()
        first += len(group.branches)
        samples = zip(group.students, values[len(group.teachers) :], strict=True)
        rows.append(
            {
                "kind": "rollout",
                "id": group.id,
                "prompt": example.row.prompt,
                "teacher": group.teachers[0].text,
                "teacher_score": values[0],
                "samples": [
                    {"text": branch.text, "finished": branch.finished, "score": score}
                    for branch, score in samples
                ],
            }
        )
    return rows
