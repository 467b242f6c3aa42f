"""Random groups of token ids and a model for them, for tests that compare two ways to the same numbers."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from gadfly.demo.models import save_models
from gadfly.groups import Branch, Group
from gadfly.models import load_language_model


def random_group(
    rng: random.Random,
    *,
    teachers: int = 1,
    students: int = 3,
    lengths: Sequence[int] = range(1, 8),
    vocabulary: int = 259,
) -> Group:
    """A group with random ids and lengths, prompt and responses; every other response is unfinished.

    Ids 0 to 2, the tiny model's control tokens, are left out, but for the 2 that ends a finished response.
    """
    words = range(3, vocabulary)

    def branch() -> Branch:
        tokens = rng.choices(words, k=rng.choice(lengths))
        finished = bool(tokens) and rng.random() < 0.5
        return Branch((*tokens[:-1], 2) if finished else tuple(tokens), finished, "")

    return Group(
        id=f"p{rng.randrange(10**9)}",
        prompt_tokens=tuple(rng.choices(words, k=rng.randint(1, 9))),
        teachers=tuple(branch() for _ in range(teachers)),
        students=tuple(branch() for _ in range(students)),
    )


def random_groups(seed: int, count: int, **kwargs: int | Sequence[int]) -> list[Group]:
    """Groups as `random_group` makes them, the same for the same seed."""
    rng = random.Random(seed)
    return [random_group(rng, **kwargs) for _ in range(count)]


def sharp_model(folder: Path) -> PreTrainedModel:
    """The tiny model in double precision, with a head of its own that makes some tokens likelier than others.

    As it is saved its logits are almost equal, and a temperature or a wrong token would hardly show.
    """
    model, _ = load_language_model(str(folder), "float64")
    random_numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(model.lm_head.weight.shape, generator=random_numbers, dtype=torch.float64)
    model.lm_head.weight = nn.Parameter(0.4 * weight)
    return model


def forgetful_folder(folder: Path) -> Path:
    """The demo's student: it brings an attention mask of its own, and refuses padding that is not masked."""
    save_models(folder, seed=0)
    return folder / "student"
