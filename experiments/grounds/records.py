"""Records into sentences: a scripted teacher of many ways, and an exact oracle of all it would ever say.

The task is the demo's (`gadfly.demo`). Here the student's memory, the discriminator's size and the number
of records may differ, and two more test sets leave what was trained on: `short` has records with three facts,
where training has four or five; `unseen` has pairs of food and city that no training record has together.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gadfly.demo.demo import count_valid_answers
from gadfly.demo.models import save_models
from gadfly.demo.scripted_teacher import FIELDS, Record, prompt, random_records, teacher_response
from gadfly.stages.run import Run

# Of the 64 pairs of food and city, those that training never shows.
_UNSEEN_PAIRS = 8


def prepare(folder: Path, seed: int, settings: Mapping[str, Any]) -> None:
    """Write rows and models.

    Settings: `records` to train on, `held_out` in every other set, `memory_tokens` of the student.
    """
    save_models(folder / "models", seed, memory_tokens=int(settings.get("memory_tokens", 6)))
    count, held = int(settings.get("records", 4096)), int(settings.get("held_out", 512))
    # An eighth of all pairs is unseen, of the three quarters of records that have both facts.
    seen, unseen = _split(random_records(seed, count + 12 * held))
    rng = random.Random(f"answers {seed}")
    sets = {
        "train": seen[2 * held : 2 * held + count],
        "valid": seen[:held],
        "test": seen[held : 2 * held],
        "short": [_shortened(record, rng) for record in seen[held : 2 * held]],
        "unseen": unseen[:held],
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, records in sets.items():
        with (folder / "data" / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_lines(name, records, rng))


def measure(run: Run, settings: Mapping[str, Any]) -> None:
    """Let the oracle count valid answers, and their variety."""
    del settings
    count_valid_answers(run.folder)


def _split(records: list[Record]) -> tuple[list[Record], list[Record]]:
    foods, cities = FIELDS["food"], FIELDS["city"]
    pairs = random.Random(0).sample([(food, city) for food in foods for city in cities], _UNSEEN_PAIRS)

    def is_unseen(record: Record) -> bool:
        return (record.facts.get("food"), record.facts.get("city")) in pairs

    return [r for r in records if not is_unseen(r)], [r for r in records if is_unseen(r)]


def _shortened(record: Record, rng: random.Random) -> Record:
    """The record with three of its facts."""
    kept = rng.sample(list(record.facts), 3)
    values = zip(FIELDS, record.values, strict=True)
    return replace(record, values=tuple(value if field in kept else None for field, value in values))


def _lines(name: str, records: list[Record], rng: random.Random) -> Iterator[str]:
    for number, record in enumerate(records):
        row = {"id": f"{name}-{number:04d}", "prompt": prompt(record)}
        yield json.dumps({**row, "response": teacher_response(record, rng)}) + "\n"
