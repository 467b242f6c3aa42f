"""A pretrained student of 260,000 parameters and a teacher that is a language model too: stories go on.

The teacher (`babyllama105`) continues an opening by two sentences; what a student writes is measured by the
teacher's own likelihood of it, which no arm sees. The student (`stories260k`) has other tokens.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from experiments.experiment import FOLDER
from gadfly.errors import ConfigError
from gadfly.stages.run import Run
from gadfly.statistics import mean

_NAMES = ("Lily", "Tom", "Max", "Sue", "Ben", "Anna", "Tim", "Mia", "Sam", "Jane")
_KINDS = ("boy", "girl", "cat", "dog", "bird", "bear", "fish", "frog", "mouse", "bunny")
_TRAITS = ("little", "big", "happy", "sad", "brave", "shy", "funny", "kind", "lazy", "smart")
_ROWS_AT_ONCE = 64
_MOST_CHARACTERS = 160
_TWO_SENTENCES = re.compile(r"^[^.!?]+[.!?]\"? [^.!?]+[.!?]\"?")


def prepare(folder: Path, seed: int, settings: Mapping[str, Any]) -> None:
    """Write rows and models. Settings: `models`, the folder of both; `records` to train on, `held_out`.

    Raises:
        ConfigError: if the models are not there.
    """
    models = _models(settings)
    counts = {
        "train": int(settings["records"]),
        "valid": int(settings["held_out"]),
        "test": int(settings["held_out"]),
    }
    openings = [
        f"Once upon a time, there was a {trait} {kind} named {name}."
        for trait in _TRAITS
        for kind in _KINDS
        for name in _NAMES
    ]
    random.Random(seed).shuffle(openings)
    texts = _generate_stories(models / "babyllama105", openings, seed)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        rows = [next(texts) for _ in range(count)]
        lines = [json.dumps({"prompt": opening, "response": text}) + "\n" for opening, text in rows]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    student, tokenizer = _open(models / "stories260k")
    tokenizer.chat_template = "{{ bos_token }}{{ messages | map(attribute='content') | join(' ') }}"
    student.save_pretrained(folder / "models" / "student")
    tokenizer.save_pretrained(folder / "models" / "student")


def measure(run: Run, settings: Mapping[str, Any]) -> None:
    """What the teacher thinks of every model's answers: nats a character, lower is likelier."""
    teacher, tokenizer = _open(_models(settings) / "babyllama105")
    for file in sorted((run.folder.path / "generations").glob("*.jsonl")):
        rows = run.folder.rows(f"generations/{file.name}")
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            surprise = [_surprise(teacher, tokenizer, row["prompt"], row["response"]) for row in own]
            figure = mean([value for value in surprise if value is not None])
            run.folder.update_summary(
                "evaluation", {model: {file.stem: {"teacher_surprise_nats": figure.as_record()}}}
            )


def _models(settings: Mapping[str, Any]) -> Path:
    models = (FOLDER.parent / str(settings["models"])).resolve()
    if not (models / "babyllama105").is_dir() or not (models / "stories260k").is_dir():
        raise ConfigError(f"{models}: stories260k and babyllama105 are not there; this experiment needs both")
    return models


def _generate_stories(model: Path, openings: Sequence[str], seed: int) -> Iterator[tuple[str, str]]:
    """Openings with the teacher's two sentences; those that it does not end are left out."""
    teacher, tokenizer = _open(model)
    torch.manual_seed(seed)
    for start in range(0, len(openings), _ROWS_AT_ONCE):
        some = openings[start : start + _ROWS_AT_ONCE]
        tokenizer.padding_side = "left"
        inputs = tokenizer([f"{opening} " for opening in some], return_tensors="pt", padding=True)
        with torch.no_grad():
            outputs = teacher.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                max_new_tokens=_MOST_CHARACTERS,
                pad_token_id=tokenizer.pad_token_id,
            )
        written = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for opening, text in zip(some, written, strict=True):
            if found := _TWO_SENTENCES.match(text.strip()):
                yield opening, found[0]


@torch.no_grad()
def _surprise(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: str, text: str
) -> float | None:
    """Nats a character of a text after its opening; None where there is none."""
    if not text:
        return None
    ids = tokenizer(f"{opening} {text}", return_tensors="pt")["input_ids"][:, :256]
    start = len(tokenizer(f"{opening} ")["input_ids"])
    logprobs = teacher(input_ids=ids).logits[0, :-1].log_softmax(-1)
    values = logprobs.gather(-1, ids[0, 1:, None])[start - 1 :, 0]
    return float(-values.mean()) if len(values) else None


def _open(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)
