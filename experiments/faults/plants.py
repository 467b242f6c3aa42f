"""Every fault there is, in the order of the table."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments.faults.course import COURSE_FAULTS, FROZEN
from experiments.faults.fault import Fault
from experiments.faults.ground import (
    TEMPLATE,
    THOUGHT,
    save_models,
    stored_rows,
    write_rows,
)
from experiments.faults.wrapped import (
    by_brevity,
    by_length,
    by_one_word,
    cut_off_module,
    in_half_precision,
    old_weights,
    prejudice,
    scored,
    spoiled_gradient,
)
from gadfly.checkpoint import save_checkpoint

_SPOILED_AT = 7
_EXPLOITED = (*FROZEN, "gad.learning_rate=3e-3")


def _answers(change: Callable[[str], str]) -> Callable[[Path], None]:
    """The teacher's answers to all training questions, changed."""

    def plant(folder: Path) -> None:
        changed = [row | {"response": change(row["response"])} for row in stored_rows(folder)]
        write_rows(folder / "data" / "train.jsonl", changed)

    return plant


def _without_end(folder: Path) -> None:
    write_rows(
        folder / "data" / "train.jsonl", [row | {"finish_reason": "length"} for row in stored_rows(folder)]
    )


def _other_end(folder: Path) -> None:
    """Answers end in a token of the template's own, and samples in another."""
    for name in ("student", "discriminator"):
        model = folder / "models" / name
        for file in ("tokenizer_config.json", "chat_template.jinja"):
            if (model / file).exists():
                text = (model / file).read_text(encoding="utf-8")
                (model / file).write_text(text.replace("<|im_end|>{% endfor", "<pad>{% endfor"))


def _slipped(folder: Path) -> None:
    own = stored_rows(folder)
    write_rows(
        folder / "data" / "train.jsonl",
        [row | {"response": own[number - 1]["response"]} for number, row in enumerate(own)],
    )


def _in_both(name: str) -> Callable[[Path], None]:
    """Training questions, in another case, in a set that is not trained on."""

    def plant(folder: Path) -> None:
        leaked = [row | {"id": f"again-{row['id']}"} for row in stored_rows(folder)[:4]]
        write_rows(folder / "data" / f"{name}.jsonl", [*stored_rows(folder, name), *leaked])

    return plant


def _no_opening(folder: Path) -> None:
    """The template does nothing with `add_generation_prompt`."""
    kept = TEMPLATE[: TEMPLATE.index("{% if add_generation_prompt")]
    for name in ("student", "discriminator"):
        (folder / "models" / name / "chat_template.jinja").write_text(kept, encoding="utf-8")


def _thinking(folder: Path) -> None:
    save_models(folder / "models", 0, THOUGHT.split())
    _answers(lambda text: f"{THOUGHT} {text}")(folder)


def _random_head(folder: Path) -> None:
    """A checkpoint whose discriminator has lost its head on the way, and got a new one."""

    def write(place: Path) -> Iterator[Path]:
        for part in ("student", "discriminator"):
            shutil.copytree(folder / "start" / part, place / part)
        file = place / "discriminator" / "score_head.safetensors"
        head = load_file(file)
        torch.manual_seed(0)
        save_file({name: 0.07 * torch.randn_like(value) for name, value in head.items()}, file)
        yield from ()

    saved = save_checkpoint(folder / "reloaded", 1, write, {})
    shutil.rmtree(folder / "start")
    saved.path.rename(folder / "start")


def _no_full_stop(folder: Path) -> None:
    """The teacher writes no full stop, as the student has learnt to."""
    for name in ("train", "valid"):
        changed = [row | {"response": row["response"].replace(" .", "")} for row in stored_rows(folder, name)]
        write_rows(folder / "data" / f"{name}.jsonl", changed)


_WARMED_STUDENT = (
    'student.model="{folder}/start/student"',
    "warmup.max_steps=1",
    "warmup.learning_rate=1e-9",
    "warmup.discriminator_final_steps=40",
    "warmup.evaluate_every=10",
    "warmup.discriminator_learning_rate=1e-2",
)

FAULTS = (
    Fault("teacher without end-of-turn", "data", "audit", "teacher-cut", plant=_without_end),
    Fault("another end-of-turn on each side", "model folder", "audit", "other-end-of-turn", plant=_other_end),
    Fault(
        "student cap too short",
        "recipe",
        "audit",
        "cap-cuts-teacher",
        settings=("sampling.max_response_tokens=20",),
    ),
    Fault(
        "teacher cut",
        "data",
        "audit",
        "teacher-cut",
        plant=_answers(lambda text: " ".join(text.split()[:22])),
    ),
    Fault("random head on reload", "checkpoint", "load", "scores", plant=_random_head),
    Fault("wrong weights after hand-over", "sampler", "alarm", "sampler-gap", 10, around=old_weights),
    Fault("temperature 0", "recipe", "config", "sampling.temperature", settings=("sampling.temperature=0",)),
    Fault("temperature next to 0", "recipe", "alarm", "copies", 10, settings=("sampling.temperature=0.01",)),
    Fault("learning rate 0", "recipe", "config", "gad.learning_rate", settings=("gad.learning_rate=0",)),
    Fault(
        "rate too small to move anything",
        "recipe",
        "alarm",
        "nothing-moves",
        5,
        settings=("gad.learning_rate=1e-12",),
    ),
    Fault(
        "rate below the rounding of bfloat16",
        "recipe",
        "alarm",
        "frozen-module",
        12,
        settings=("student.dtype=bfloat16", "gad.learning_rate=1e-6", "gad.discriminator_learning_rate=1e-6"),
    ),
    Fault("frozen module", "model", "alarm", "frozen-module", 12, around=cut_off_module),
    Fault("mis-paired prompts", "data", "audit", "mis-paired", plant=_slipped),
    Fault(
        "score ties of bfloat16",
        "score reader",
        "alarm",
        "score-ties",
        20,
        around=lambda: scored(in_half_precision),
    ),
    Fault("questions in training and test", "data", "audit", "leak-into-test", plant=_in_both("test")),
    Fault(
        "questions in training and held-out set", "data", "audit", "leak-into-valid", plant=_in_both("valid")
    ),
    Fault(
        "template without generation prompt",
        "model folder",
        "audit",
        "no-generation-prompt",
        plant=_no_opening,
    ),
    Fault("thinking tags on one side", "data", "audit", "thinking-tags", plant=_thinking),
    Fault(
        "surface shortcut: told from step 5 on",
        "data",
        "alarm",
        "separates-early",
        9,
        "warmup",
        _WARMED_STUDENT,
        _no_full_stop,
    ),
    Fault(
        "the same, on held-out prompts",
        "data",
        "alarm",
        "surface-shortcut",
        20,
        "warmup",
        _WARMED_STUDENT,
        _no_full_stop,
        beside=("separates-early", "format-sensitive"),
    ),
    Fault(
        "collapse to one token",
        "score reader",
        "alarm",
        "collapse",
        30,
        settings=_EXPLOITED,
        around=lambda: prejudice(by_one_word),
        beside=("fooled", "repetition"),
    ),
    Fault(
        "collapse to next to nothing",
        "score reader",
        "alarm",
        "collapse",
        20,
        settings=_EXPLOITED,
        around=lambda: prejudice(by_brevity),
        beside=("fooled",),
    ),
    Fault(
        "length run-away, frozen discriminator",
        "score reader",
        "alarm",
        "length-runaway",
        30,
        settings=(*_EXPLOITED, "sampling.max_response_tokens=80"),
        around=lambda: prejudice(by_length),
        beside=("ends-differ", "fooled", "repetition", "drift"),
    ),
    Fault(
        "NaN gradient",
        "model",
        "alarm",
        "not-finite",
        _SPOILED_AT,
        around=lambda: spoiled_gradient(_SPOILED_AT),
    ),
    *COURSE_FAULTS,
)
"""All faults."""
