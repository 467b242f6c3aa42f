"""Where faults are planted: questions about made-up people, models of a few thousand weights, a recipe.

It has what a real set has and a fault may spoil: answers that repeat words of their questions, of several
sentences and different lengths; a chat template with turns; held-out and test questions of their own.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gadfly.demo.models import save_model, tokenizer_of

Row = dict[str, str]

ROWS = {"train": 384, "valid": 64, "test": 40}
"""Rows of each set; no question is in two."""

_SYLLABLES = ("ba", "chi", "do", "fre", "gal", "hum", "jor", "kel", "lo", "mi", "nak", "pol")
_NAMES = [first + second for first in _SYLLABLES for second in _SYLLABLES[:6]]
_CITIES = [first + second + "ton" for first in _SYLLABLES[:6] for second in _SYLLABLES[6:10]]
_JOBS = ("baker", "nurse", "pilot", "tailor", "farmer", "singer", "lawyer", "painter", "judge", "smith")
_HABITS = (
    "every day {name} walks to the old market .",
    "in spring they plant red roses by a wall .",
    "their friends say {name} sings well at night .",
    "nobody in {city} cooks better soup than they do .",
    "on sundays the whole family meets for tea .",
    "they once owned seven cats and one small boat .",
)
THOUGHT = "<think> well let me see </think>"

TEMPLATE = (
    "{% for message in messages %} <|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|>"
    "{% endfor %}{% if add_generation_prompt %} <|im_start|> assistant{% endif %}"
)

_RECIPE = """
name = "faults"
run_folder = "runs/none"

[data]
train = "data/train.jsonl"
valid = "data/valid.jsonl"
test = { asked = "data/test.jsonl" }

[student]
model = "models/student"
adam_betas = [0.9, 0.99]
max_grad_norm = 1.0

[discriminator]
model = "models/discriminator"
adam_betas = [0.9, 0.99]
max_grad_norm = 1.0

[sampling]
temperature = 1.0
max_prompt_tokens = 24
max_response_tokens = 48

[warmup]
learning_rate = 1e-2
learning_rate_schedule = "cosine"
batch_prompts = 32
max_steps = 100
group_size = 2
discriminator_only_steps = 0
discriminator_every = 0
discriminator_final_steps = 30
discriminator_learning_rate = 1e-3
evaluate_every = 1000
save_every = 1000

[gad]
learning_rate = 3e-4
batch_prompts = 16
group_size = 4
max_steps = 50
kl_coefficient = 0.1
discriminator_learning_rate = 3e-4
evaluate_every = 10
save_every = 1000

[evaluation]
prompts = 32

[engine]
num_threads = 1
"""


def prepare(folder: Path, seed: int) -> Path:
    """Write data, models and the recipe into a folder; all follow from the seed."""
    for name, some in rows(seed).items():
        write_rows(folder / "data" / f"{name}.jsonl", some)
    save_models(folder / "models", seed)
    (folder / "recipe.toml").write_text(f"seed = {seed}\n{_RECIPE}", encoding="utf-8")
    return folder / "recipe.toml"


def rows(seed: int) -> dict[str, list[Row]]:
    """Questions with their answers, by set."""
    rng = random.Random(f"faults {seed}")
    people = [(name, job, city) for name in _NAMES for job in _JOBS for city in _CITIES]
    asked = iter(rng.sample(people, sum(ROWS.values())))
    return {
        name: [_row(f"{name}-{number}", *next(asked), rng) for number in range(count)]
        for name, count in ROWS.items()
    }


def write_rows(path: Path, some: Sequence[Row]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


def stored_rows(folder: Path, name: str = "train") -> list[Row]:
    """The rows of a set of a prepared folder."""
    lines = (folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _row(id_: str, name: str, job: str, city: str, rng: random.Random) -> Row:
    sentences = [habit.format(name=name, city=city) for habit in rng.sample(_HABITS, rng.choice((1, 2, 3)))]
    return {
        "id": id_,
        "prompt": f"tell me of {name} the {job} in {city}",
        "response": " ".join([f"{name} is a good {job} in {city} .", *sentences]),
    }


def _words() -> Iterator[str]:
    yield from ("user", "assistant", "tell", "me", "of", "the", "in", "is", "a", "good", ".")
    yield from (*_NAMES, *_JOBS, *_CITIES)
    for habit in _HABITS:
        yield from (word for word in habit.split() if "{" not in word)


def save_models(folder: Path, seed: int, words: Sequence[str] = ()) -> None:
    """Write `student` and `discriminator`: Llamas of two narrow layers, in random weights.

    Args:
        folder: where to.
        seed: decides the weights.
        words: more of the vocabulary.
    """
    tokenizer = tokenizer_of(
        ["<unk>", *_words(), *words],
        end="<|im_end|>",
        template=TEMPLATE,
        additional_special_tokens=["<|im_start|>"],
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        initializer_range=0.07,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for number, name in enumerate(("student", "discriminator")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2 * seed + number)
            model = LlamaForCausalLM(config)
        save_model(model, tokenizer, folder / name)
