"""Records into sentences: a scripted teacher of many ways, and an exact oracle of all it would ever say.

The task is the demo's (`gadfly.demo`). Here the student's memory, the discriminator's size and the number
of records may differ, and two more test sets leave what was trained on: `short` has records with three facts,
where training has four or five; `unseen` has pairs of food and city that no training record has together.
"""

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.ranking import measure_ranking
from experiments.training import summarise_training
from gadfly.demo.demo import count_valid_answers
from gadfly.demo.models import save_models
from gadfly.demo.scripted_teacher import (
    FIELDS,
    Record,
    judge,
    parse_prompt,
    prompt,
    random_records,
    teacher_response,
)
from gadfly.groups import Branch
from gadfly.records import Row
from gadfly.stages.run import Run
from gadfly.statistics import share

# Width and layers: about as many parameters as the student has, and three times as many as the usual one.
_OTHER_DISCRIMINATORS = {"same-size": (32, 1), "larger": (96, 3)}
_RANKED_PROMPTS = 128
# Of the 64 pairs of food and city, those that training never shows.
_UNSEEN_PAIRS = 8


def prepare(folder: Path, seed: int, settings: Mapping[str, Any]) -> None:
    """Write rows and models.

    Settings: `records` to train on, `held_out` in every other set, `memory_tokens` of the student.

    Beside the discriminator there are `same-size`, of the student's size, and `larger`.
    """
    memory = int(settings.get("memory_tokens", 6))
    save_models(folder / "models", seed, memory_tokens=memory)
    for name, (size, layers) in _OTHER_DISCRIMINATORS.items():
        other = folder / "models-other"
        save_models(other, seed, discriminator_size=size, discriminator_layers=layers)
        # Of a run that was killed here.
        shutil.rmtree(folder / "models" / name, ignore_errors=True)
        (other / "discriminator").rename(folder / "models" / name)
        shutil.rmtree(other)
    count, num_held_out = int(settings.get("records", 4096)), int(settings.get("held_out", 512))
    # An eighth of all pairs is unseen, of the three quarters of records that have both facts.
    seen, unseen = _split(random_records(seed, count + 12 * num_held_out))
    rng = random.Random(f"answers {seed}")
    sets = {
        "train": seen[2 * num_held_out : 2 * num_held_out + count],
        "valid": seen[:num_held_out],
        "test": seen[num_held_out : 2 * num_held_out],
        "short": [_shortened(record, rng) for record in seen[num_held_out : 2 * num_held_out]],
        "unseen": unseen[:num_held_out],
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, records in sets.items():
        with (folder / "data" / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_lines(name, records, rng))


def valid(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
    """1 for an answer that the teacher could have given: the oracle as a reward, for arms to name."""
    del teachers
    return [float(judge(parse_prompt(prompt), response).valid) for response in responses]


def once(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
    """1 for an answer that tells no fact twice: a part of what the oracle knows."""
    del teachers
    return [float(judge(parse_prompt(prompt), response).why != "repeated") for response in responses]


def measure(run: Run, settings: Mapping[str, Any]) -> None:
    """Let the oracle count valid answers, those that tell a fact twice, and the answers' variety.

    Also how the discriminators rank valid and other samples; of gad, `training` has means of its last steps.
    """
    del settings
    count_valid_answers(run.folder)
    for model, sets in run.folder.read_json("summary.json")["evaluation"].items():
        for test_set in sets:
            rows = run.folder.rows(f"generations/{test_set}.jsonl")
            texts = [(row["prompt"], row["response"]) for row in rows if row["model"] == model]
            if texts:
                repeated = share(
                    [judge(parse_prompt(about), text).why == "repeated" for about, text in texts]
                )
                figures = {test_set: {"repeated_fraction": repeated.as_record()}}
                run.folder.update_summary("evaluation", {model: figures})
    summarise_training(run)
    measure_ranking(run, "test", _RANKED_PROMPTS, _is_valid)


def _is_valid(row: Row, branch: Branch) -> bool:
    return branch.finished and judge(parse_prompt(row.prompt), branch.text).valid


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
