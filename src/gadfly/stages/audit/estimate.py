"""What a run will take, before it begins: memory and disk by formula, time by the pace of the audit."""

import os
import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch

from gadfly.analysis.audit_findings import Finding
from gadfly.config import TRAINING_STAGES, GadConfig, Recipe, Training, WarmupConfig
from gadfly.errors import UserError
from gadfly.sizing.memory_plan import Workload, checkpoint_bytes, plan_memory
from gadfly.stages.plan import workload
from gadfly.stages.run import Run

# Forward passes that a training step of one role costs: itself, and twice that for the backward pass.
_TRAINED = 3


@dataclass(frozen=True)
class Pace:
    """What the audit measured of this machine.

    Attributes:
        sampled: tokens a second that the student draws.
        read: tokens a second of the discriminator's forward pass.
        prompt_tokens: mean length of a prompt.
        teacher_tokens: of the teacher's answer as trained on.
        student_tokens: of a sample.
    """

    sampled: float
    read: float
    prompt_tokens: float
    teacher_tokens: float
    student_tokens: float


OF_THE_DISK = ("free_disk_bytes", "written_bytes")
"""What the estimate says of the disk as it is: its free room, and what checkpoints of the run take."""


def estimate(run: Run, pace: Pace) -> dict[str, Any]:
    """Bytes a process and seconds, as `audit.json` holds them; no bytes where a model's config tells none."""
    size, num_rows = _num_processes(), len(run.data.train)
    answers = [len(row.responses) for row in run.data.train]
    memory = _machine_memory(size)
    try:
        work = workload(run.recipe, size, memory)
    except UserError:
        work = None
    # The discriminator's pace was measured; the student's follows from its size.
    relative = work.student.parameters / work.discriminator.decoder_parameters if work else 1.0
    taught = replace(pace, teacher_tokens=pace.teacher_tokens * sum(answers) / num_rows)
    seconds = _seconds(run.recipe, num_rows, taught, relative)
    result: dict[str, Any] = {
        "seconds": {stage: round(value / size) for stage, value in seconds.items()},
        "sampled_tokens_per_second": round(pace.sampled),
        "read_tokens_per_second": round(pace.read),
    }
    if work is None:
        return result
    work = replace(
        work,
        is_flex=torch.cuda.is_available(),
        batch_prompts=min(work.batch_prompts, num_rows),
        teachers=max(answers),
    )
    if not torch.cuda.is_available() and work.sampler == "vllm":
        work = replace(work, sampler="local")
    return result | {
        "peak_bytes": round(plan_memory(work).peak),
        "memory_bytes": round(memory),
        "checkpoint_bytes": round(checkpoint_bytes(work)),
        "disk_bytes": round(_disk_bytes(run.recipe, work)),
        "free_disk_bytes": shutil.disk_usage(run.folder.path).free,
        "written_bytes": _written_bytes(run),
    }


def size_findings(estimated: dict[str, Any]) -> list[Finding]:
    """Whether memory or disk do not suffice."""
    if "peak_bytes" not in estimated:
        return []
    # What the run has written by now is room that it has taken already.
    disk = estimated["free_disk_bytes"] + estimated["written_bytes"]
    parts = (
        ("memory", estimated["peak_bytes"], estimated["memory_bytes"]),
        ("disk", estimated["disk_bytes"], disk),
    )
    return [
        Finding("does-not-fit", f"{what}: {needed / 1e9:.1f} GB of {there / 1e9:.1f} GB")
        for what, needed, there in parts
        if needed > there
    ]


def _num_processes() -> int:
    """How many will train: the audit itself is the first one's alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _machine_memory(num_processes: int) -> float:
    """Of a GPU, or a process's share of the machine's."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / num_processes


def _disk_bytes(recipe: Recipe, work: Workload) -> float:
    """All that is kept at once: the last and best of each stage, and one being written."""
    kept = recipe.checkpoints.keep_last + recipe.checkpoints.keep_best
    both = checkpoint_bytes(work)
    student = (
        both * work.student.parameters / (work.student.parameters + work.discriminator.decoder_parameters)
    )
    language = both - student if recipe.discriminator.lm_steps else 0.0
    return (2 * kept + 1) * both + kept * ((1 + recipe.seqkd.equal_time) * student + language)


def _written_bytes(run: Run) -> int:
    """Of the checkpoints that are there."""
    files = (path for stage in TRAINING_STAGES for path in run.folder.stage(stage).glob("step-*/**/*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _steps(training: Training, num_rows: int) -> int:
    if training.max_steps is not None:
        return training.max_steps
    return max(1, round(training.epochs * (num_rows // min(training.batch_prompts, num_rows))))


def _seconds(recipe: Recipe, num_rows: int, pace: Pace, relative: float) -> dict[str, float]:
    """Of the stages in one process; `relative` is the student's size by the discriminator's."""

    def prompts(training: Training) -> int:
        return min(training.batch_prompts, num_rows)

    def sft(training: Training) -> float:
        read = _TRAINED * prompts(training) * (pace.prompt_tokens + pace.teacher_tokens)
        return relative * read / pace.read

    def discriminator_step(training: WarmupConfig | GadConfig) -> float:
        """A step of the discriminator on fresh samples."""
        drawn = training.group_size * pace.student_tokens
        read = _TRAINED * (pace.prompt_tokens + pace.teacher_tokens + drawn)
        return prompts(training) * (read / pace.read + drawn / pace.sampled)

    warmup, gad = recipe.warmup, recipe.gad
    joint = _steps(warmup, num_rows)
    every = warmup.discriminator_every
    discriminator_steps = (
        warmup.discriminator_only_steps + warmup.discriminator_final_steps + (joint // every if every else 0)
    )
    drawn = gad.group_size * pace.student_tokens
    passes = _TRAINED + (1 if gad.kl_coefficient > 0 else 0)
    policy = relative * prompts(gad) * passes * (pace.prompt_tokens + drawn) / pace.read
    lm_steps, lm_prompts = recipe.discriminator.lm_steps, min(recipe.discriminator.lm_batch_prompts, num_rows)
    language = lm_steps * _TRAINED * lm_prompts * (pace.prompt_tokens + pace.teacher_tokens) / pace.read
    return {
        **({"discriminator-lm": language} if lm_steps else {}),
        "seqkd": _steps(recipe.seqkd, num_rows) * sft(recipe.seqkd),
        "warmup": joint * sft(warmup) + discriminator_steps * discriminator_step(warmup),
        "gad": _steps(gad, num_rows) * (discriminator_step(gad) + policy),
    }
