"""Faults of the course that training takes, which only a number of steps or of evaluations can show."""

from collections.abc import Callable
from pathlib import Path

from experiments.faults.fault import Fault
from experiments.faults.ground import stored_rows, write_rows
from experiments.faults.wrapped import turned_gradient, turning_reward

_STILL = "gad.discriminator_every=1000000"
FROZEN = (_STILL, "gad.kl_coefficient=0.0")
"""A discriminator that stands still, since its turn never comes, and nothing that holds the student."""


def _most_cut(folder: Path) -> None:
    """Three of four answers of the teacher say that they were cut, and end like all others."""
    some = stored_rows(folder)
    cut = [row | ({"finish_reason": "length"} if number % 4 else {}) for number, row in enumerate(some)]
    write_rows(folder / "data" / "train.jsonl", cut)


def _only(count: int) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        write_rows(folder / "data" / "train.jsonl", stored_rows(folder)[:count])

    return plant


COURSE_FAULTS = (
    Fault(
        "three of four teacher's answers marked as cut",
        "data",
        "alarm",
        "ends-differ",
        25,
        plant=_most_cut,
    ),
    Fault(
        "student's rate thirty times too high",
        "recipe",
        "alarm",
        "drift",
        20,
        settings=("gad.learning_rate=1e-2", "gad.kl_coefficient=1e-3"),
        beside=("ends-differ",),
    ),
    Fault(
        "discriminator trained upside down",
        "model",
        "alarm",
        "fooled",
        45,
        around=turned_gradient,
    ),
    Fault(
        "sixteen training prompts, discriminator's rate ten times too high",
        "data",
        "alarm",
        "memorises",
        60,
        settings=("gad.max_steps=60", "gad.batch_prompts=8", "gad.discriminator_learning_rate=3e-3"),
        plant=_only(16),
        beside=("too-strong",),
    ),
    Fault(
        "reward turned round every 15 steps",
        "advantages",
        "alarm",
        "cycling",
        75,
        settings=(
            _STILL,
            "gad.max_steps=75",
            "gad.learning_rate=2e-3",
            "gad.evaluate_every=5",
            "evaluation.prompts=64",
        ),
        around=lambda: turning_reward(15),
        beside=("hacking", "fooled", "repetition", "collapse"),
    ),
    Fault(
        "frozen discriminator, nothing that holds the student",
        "recipe",
        "alarm",
        "hacking",
        20,
        settings=(*FROZEN, "gad.learning_rate=3e-3", "gad.evaluate_every=5"),
        beside=("fooled", "repetition", "collapse"),
    ),
)
"""In the order of the catalogue of alarms."""
