"""The rival of the step benchmarks: trl's GRPOTrainer, with a discriminator trained in its reward function.

It is what thirty lines make of trl, at its best: single precision, no gradient checkpointing, no dropout, no
logs; the discriminator's scores and its loss come from one forward pass, the teacher's response once a pass,
on the sampled ids themselves.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.gad_step import CLIP_RANGE, KL_COEFFICIENT, LEARNING_RATE
from benchmarks.subjects import TEMPERATURE, Shape, Size, new_model, new_renderer
from gadfly.config import Optimizer
from gadfly.stages.examples import Example


@dataclass(frozen=True)
class Passes:
    """How the rival cuts its work.

    Attributes:
        student_rows: responses in one forward and backward pass of the student.
        discriminator_prompts: prompts in one of the discriminator.
        discriminator_samples: responses a prompt in it; at less than all, the teacher's is computed again.
    """

    student_rows: int
    discriminator_prompts: int
    discriminator_samples: int


class TrainedReward:
    """A reward function that trains the classifier whose scores it returns."""

    __name__ = "bradley_terry"

    def __init__(self, folder: Path, group_size: int, passes: Passes):
        self._classifier = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, pad_token_id=0
        )
        self._group_size, self._passes = group_size, passes
        settings = Optimizer()
        self._max_norm = settings.max_grad_norm
        self._adamw = torch.optim.AdamW(
            self._classifier.parameters(), lr=LEARNING_RATE, weight_decay=settings.weight_decay, fused=True
        )

    def __call__(
        self,
        completion_ids: list[list[int]],
        prompt_ids: list[list[int]],
        teacher_ids: list[list[int]],
        **_: Any,
    ) -> list[float]:
        """Scores before the update, one a sample."""
        scores = torch.zeros(len(completion_ids))
        size, count = self._group_size, self._passes.discriminator_samples
        pieces = [
            range(start, start + count)
            for group in range(0, len(completion_ids), size)
            for start in range(group, group + size, count)
        ]
        prompts = self._passes.discriminator_prompts
        for at in range(0, len(pieces), prompts):
            members = pieces[at : at + prompts]
            rows = [prompt_ids[i] + completion_ids[i] for piece in members for i in piece]
            rows += [prompt_ids[piece[0]] + teacher_ids[piece[0]] for piece in members]
            values = self._classifier(**_padded(rows)).logits[:, 0]
            students, teachers = values[: -len(members)].view(len(members), -1), values[-len(members) :]
            loss = -nn.functional.logsigmoid(teachers[:, None] - students).sum() / len(scores)
            loss.backward()
            scores[[i for piece in members for i in piece]] = students.detach().flatten()
        nn.utils.clip_grad_norm_(self._classifier.parameters(), self._max_norm)
        self._adamw.step()
        self._adamw.zero_grad()
        return scores.tolist()


def run_beside(
    size: Size,
    shape: Shape,
    passes: Passes,
    examples: list[Example],
    steps: int,
    folder: Path,
    ours: Callable[[], object],
) -> tuple[list[tuple[float, float]], str]:
    """Train for some steps, with `ours` after each.

    Returns:
        Seconds of each of the rival's steps and of `ours` after it, without the first; its settings.
    """
    new_model(size, shares_prompts=False).save_pretrained(folder / "model")
    config = _config(shape, passes, steps, folder / "run")
    turns = _Turns(ours)
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=TrainedReward(folder / "model", shape.group_size, passes),
        args=config,
        processing_class=new_renderer(size).tokenizer,
        train_dataset=Dataset.from_dict(
            {
                "prompt": [example.row.prompt for example in examples],
                "prompt_ids": [example.group.prompt_tokens for example in examples],
                "teacher_ids": [example.group.teachers[0].tokens for example in examples],
            }
        ),
        callbacks=[turns],
    )
    assert trainer.ref_model is not None
    turns.start()
    # It closes with figures that are no part of ours.
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    return turns.times[1:], _settings(config, passes)


def _config(shape: Shape, passes: Passes, steps: int, folder: Path) -> GRPOConfig:
    rows = shape.prompts * shape.group_size
    settings = Optimizer()
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        activation_checkpointing=False,
        disable_dropout=True,
        per_device_train_batch_size=passes.student_rows,
        gradient_accumulation_steps=rows // passes.student_rows,
        num_generations=shape.group_size,
        max_completion_length=shape.response_tokens,
        temperature=TEMPERATURE,
        beta=KL_COEFFICIENT,
        epsilon=CLIP_RANGE,
        learning_rate=LEARNING_RATE,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="constant",
        max_steps=steps,
        generation_kwargs={"eos_token_id": None},
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _settings(config: GRPOConfig, passes: Passes) -> str:
    shown = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "generation_batch_size",
        "num_generations",
        "activation_checkpointing",
        "bf16",
        "beta",
        "loss_type",
        "optim",
    )
    settings = ", ".join(f"{name}={getattr(config, name)}" for name in shown)
    return (
        f"trl: {settings}; its discriminator: {passes.discriminator_prompts} prompts x "
        f"({passes.discriminator_samples} samples + teacher) a pass"
    )


class _Turns(TrainerCallback):
    """Times the trainer's steps, and after each takes a step of ours."""

    def __init__(self, ours: Callable[[], object]):
        self.times: list[tuple[float, float]] = []
        self._ours = ours
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        ended = time.perf_counter()
        self._ours()
        now = time.perf_counter()
        self.times.append((ended - self._began, now - ended))
        self.start()


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
