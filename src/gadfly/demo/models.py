"""The demo's files: two tiny models in random weights, their tokenizer, the teacher's answers."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gadfly.demo.forgetful import ForgetfulConfig, ForgetfulForCausalLM
from gadfly.demo.scripted_teacher import prompt, random_records, teacher_response, vocabulary
from gadfly.models import save_language_model

PROMPT_TOKENS = len(prompt(random_records(seed=0, count=1)[0]).split())
"""Tokens of every prompt: 13."""

MAX_RESPONSE_TOKENS = 40
"""Room for any answer of the teacher, at most 30 words and the end of turn, and for slips."""

ROWS = {"train": 4096, "valid": 512, "test": 512}
"""Number of records in each set; no record is in two."""

_MEMORY_TOKENS = 6
# Transformers' own 0.02 is meant for wide layers: in these, attention then learns to copy too late.
_INITIALIZER_RANGE = 0.07


def save_models(
    folder: Path,
    seed: int,
    *,
    memory_tokens: int = _MEMORY_TOKENS,
    discriminator_size: int = 64,
    discriminator_layers: int = 2,
) -> None:
    """Write `student` and `discriminator` into `folder`, in random weights that follow from `seed`.

    The student (20,320 parameters) sees the record and its own last `memory_tokens`; the discriminator
    (114,496 at its default size) sees the whole text. Torch's own random state stays as it was.

    Args:
        folder: where to.
        seed: of the weights.
        memory_tokens: of the student.
        discriminator_size: width of its hidden states, a multiple of 16; its MLP is three times as wide.
        discriminator_layers: how many.
    """
    tokenizer = word_tokenizer()
    shared = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": PROMPT_TOKENS + MAX_RESPONSE_TOKENS,
        "initializer_range": _INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    student = ForgetfulConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        record_tokens=PROMPT_TOKENS,
        memory_tokens=memory_tokens,
        **shared,
    )
    discriminator = LlamaConfig(
        hidden_size=discriminator_size,
        intermediate_size=3 * discriminator_size,
        num_hidden_layers=discriminator_layers,
        num_attention_heads=discriminator_size // 16,
        **shared,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models: dict[str, PreTrainedModel] = {
            "student": ForgetfulForCausalLM(student),
            "discriminator": LlamaForCausalLM(discriminator),
        }
    for name, model in models.items():
        save_model(model, tokenizer, folder / name)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model whose turns end in the tokenizer's end token, and the tokenizer."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save_language_model(model, tokenizer, folder)


def save_rows(folder: Path, seed: int) -> None:
    """Write train, valid and test rows into `folder` as JSONL: one teacher answer a record."""
    folder.mkdir(parents=True, exist_ok=True)
    records = iter(random_records(seed, sum(ROWS.values())))
    rng = random.Random(f"answers {seed}")
    for name, count in ROWS.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for number in range(count):
                record = next(records)
                row = {
                    "id": f"{name}-{number:04d}",
                    "prompt": prompt(record),
                    "response": teacher_response(record, rng),
                }
                file.write(json.dumps(row) + "\n")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the teacher's vocabulary; a prompt is rendered as its own text.

    The control tokens are no words of it, so the text `<end>` is unknown and does not end a turn
    where the tokenizer is told to split special tokens.
    """
    return tokenizer_of(["<unk>", *vocabulary()])


def tokenizer_of(
    words: Iterable[str],
    *,
    end: str = "<end>",
    template: str = "{{ messages | map(attribute='content') | join(' ') }}",
    **special: Any,
) -> PreTrainedTokenizerFast:
    """One token a word between white space.

    Args:
        words: the vocabulary, `<unk>` included; a word's place is its number.
        end: what ends a turn; it and `<pad>` follow the words unless they are among them.
        template: by default a conversation is rendered as its own text.
        special: further special tokens, as the tokenizer takes them.
    """
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=end,
        clean_up_tokenization_spaces=False,
        chat_template=template,
        **special,
    )
