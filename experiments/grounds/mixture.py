"""One bump for many: the teacher draws whole numbers from a mixture of Gaussians, the student has one.

The paper's figure 5 (arXiv 2511.10643), whose numbers are not given there. An answer is one token, the class;
the prompt says nothing. Everything is exact: the student is two numbers, and so is what it says.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from experiments.grounds.mixture_models import (
    OneGaussianConfig,
    OneGaussianForCausalLM,
    TableConfig,
    TableModel,
)
from gadfly.demo.models import save_model, tokenizer_of
from gadfly.stages.named_models import named_models
from gadfly.stages.run import Run
from gadfly.statistics import mean

_SPECIAL = ("<unk>", "<pad>", "<end>", "draw")


def prepare(folder: Path, seed: int, settings: Mapping[str, Any]) -> None:
    """Write rows and models.

    Settings: `classes`; `means`, `weights` and `deviation` of the teacher; `records` to train on, `held_out`;
    where the student starts, as shares of the classes: `initial_mean`, `initial_deviation`.
    """
    classes = int(settings["classes"])
    shares = teacher_shares(settings)
    rng = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    held_out = int(settings["held_out"])
    counts = {"train": int(settings["records"]), "valid": held_out, "test": held_out}
    for name, count in counts.items():
        drawn = rng.choice(classes, size=count, p=shares)
        rows = [
            {"prompt": f"draw {name} {number}", "response": f"c{place}"} for number, place in enumerate(drawn)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = tokenizer_of([*(f"c{place}" for place in range(classes)), *_SPECIAL])
    student = OneGaussianConfig(
        classes=classes,
        vocab_size=len(tokenizer),
        initial_mean=float(settings.get("initial_mean", 0.5)),
        initial_deviation=float(settings.get("initial_deviation", 0.25)),
    )
    table = TableConfig(vocab_size=len(tokenizer), hidden_size=len(tokenizer))
    save_model(OneGaussianForCausalLM(student), tokenizer, folder / "models" / "student")
    save_model(TableModel(table), tokenizer, folder / "models" / "discriminator")


def measure(run: Run, settings: Mapping[str, Any]) -> None:
    """What every student says, exactly.

    `on_teacher`: how much of it lies on the classes that make up 99 % of the teacher; divergences in nats.
    """
    teacher = teacher_shares(settings)
    order = np.argsort(-teacher)
    support = order[: int(np.searchsorted(teacher[order].cumsum(), 0.99)) + 1]
    for model in named_models(run):
        student = AutoModelForCausalLM.from_pretrained(model.source)
        own = student.class_logits().double().softmax(0).detach().numpy()
        places = np.arange(len(own))
        centre = float(own @ places)
        figures = {
            "on_teacher_fraction": float(own[support].sum()),
            "forward_kl_nats": _kl(teacher, own),
            "reverse_kl_nats": _kl(own, teacher),
            "mean": centre,
            "deviation": math.sqrt(float(own @ (places - centre) ** 2)),
        }
        records = {name: mean([value]).as_record() for name, value in figures.items()}
        run.folder.update_summary("evaluation", {model.name: {"exact": records}})


def teacher_shares(settings: Mapping[str, Any]) -> np.ndarray:
    """[class], how often the teacher says it."""
    places = np.arange(int(settings["classes"]))
    bumps = [
        weight * np.exp(-((places - centre) ** 2) / (2 * float(settings["deviation"]) ** 2))
        for centre, weight in zip(settings["means"], settings["weights"], strict=True)
    ]
    shares: np.ndarray = sum(bumps) / np.sum(bumps)
    return shares


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    kept = p > 0
    return float(p[kept] @ (np.log(p[kept]) - np.log(np.maximum(q[kept], 1e-300))))
