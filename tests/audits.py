"""Small sets of questions and answers for the tests of the audit, with nothing wrong but what is planted."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gadfly.recipe_file import load_recipe
from gadfly.stages.audit import audit
from gadfly.stages.run import open_run

Fields = dict[str, Any]

UNTRAINED = {"student-runs-on", "told-by-surface"}
"""What is found of any student that knows nothing yet."""

_SYLLABLES = (
    "ba",
    "chi",
    "do",
    "fre",
    "gal",
    "hum",
    "jor",
    "kel",
    "lo",
    "mi",
    "nak",
    "pol",
    "qui",
    "ras",
    "tev",
)
_KINDS = ("harbour", "poet", "river", "spice", "festival", "mountain", "bridge", "dance")
_VERBS = ("came to be", "got its name", "is known today", "was lost twice", "is loved by all")


def rows(seed: int, count: int = 120) -> list[Fields]:
    """Questions about made-up things, each with an answer of some sentences."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(_SYLLABLES, k=4)).capitalize()

    made = []
    for number in range(count):
        thing, place, kind = word(), word(), rng.choice(_KINDS)
        extra = " ".join(f"People there speak of {word()} as well." for _ in range(rng.randrange(2)))
        made.append(
            {
                "id": f"{seed}-{number}",
                "prompt": f"Tell me how the {kind} {thing} near {place} {rng.choice(_VERBS)}.",
                "response": f"{thing} is an old {kind}. Those in {place} say it is theirs. {extra}".strip(),
            }
        )
    return made


def write(path: Path, some: Sequence[Fields]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


def recipe(folder: Path, model: Path, train: Sequence[Fields], *, test: Sequence[Fields] = ()) -> Path:
    """A recipe with these training rows and, unless others are given, test rows of their own."""
    write(folder / "train.jsonl", train)
    write(folder / "valid.jsonl", rows(1001, 20))
    write(folder / "test.jsonl", test or rows(1002, 20))
    path = folder / "recipe.toml"
    path.write_text(
        f"""
name = "audited"
[data]
train = "train.jsonl"
valid = "valid.jsonl"
test = {{ asked = "test.jsonl" }}
[student]
model = "{model}"
[sampling]
max_prompt_tokens = 200
max_response_tokens = 200
[warmup]
batch_prompts = 8
group_size = 2
discriminator_only_steps = 0
discriminator_every = 0
[evaluation]
prompts = 4
[audit]
prompts = 24
""",
        encoding="utf-8",
    )
    return path


def found(path: Path, *settings: str) -> dict[str, bool]:
    """The findings of an audit by name, and whether each is mechanical; none of them stops it."""
    names = [
        "cap-cuts-teacher",
        "control-strings",
        "identical-text",
        "leak-into-test",
        "no-generation-prompt",
    ]
    names += ["teacher-cut", "thinking-tags", "white-space"]
    with open_run(load_recipe(path, [f"audit.allow={json.dumps(names)}", *settings])) as run:
        audit(run)
        findings = run.folder.read_json("audit.json")["audit"]["findings"]
    return {finding["name"]: finding["mechanical"] for finding in findings}
