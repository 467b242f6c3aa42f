"""Whether prompts are what they seem: answers belong to them, and none of a test set is trained on.

An answer repeats words of its own prompt, rare ones above all. If it shares no more with its own than with
other prompts of the set, rows have slipped: a file sorted on one side only, a column shifted by one.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gadfly.analysis.audit_findings import Finding
from gadfly.analysis.near_duplicates import near_duplicates
from gadfly.data.dataset import normalised_prompt
from gadfly.records import Row
from gadfly.statistics import Figure, mean

MIN_PAIRS = 40
"""Fewer pairs with enough words to tell are not tested."""

# Below this an answer is hardly more like its own prompt than like others. Real sets of six models and of
# people lie between 0.85 and 1; with their answers shifted by a row, between 0.48 and 0.65: some are sorted.
_SLIPPED = 0.75
# Shares of a set: a leak that moves figures, and more near duplicates than come about by themselves.
_LEAK, _NEAR = 0.01, 0.05
# Of prompts over the cap: some always are.
_OVER_LONG = 0.05

_OTHERS = 20
# Of different words, in an answer and its prompt: a label or a number tells nothing of its prompt.
_LEAST_ANSWER_WORDS, _LEAST_PROMPT_WORDS = 8, 3
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pairing:
    """How often an answer is more like its own prompt than like another one of the set: 0.5 is chance."""

    own: Figure


@dataclass(frozen=True)
class Leak:
    """Prompts of a set that the training data has too.

    Example:
        >>> Leak("vicuna", 80, same=(("7", "12"),), near=()).share
        0.0125
    """

    name: str
    prompts: int
    """In the set."""
    same: tuple[tuple[str, str], ...]
    """Ids in the set and in the training data: equal but for case, white space and Unicode's variants."""
    near: tuple[tuple[str, str], ...]
    """The same for those that are nearly equal."""

    @property
    def share(self) -> float:
        """Of the set's prompts that are equal to a training prompt."""
        return len(self.same) / self.prompts if self.prompts else 0.0

    @property
    def near_share(self) -> float:
        """Of those that are nearly equal."""
        return len(self.near) / self.prompts if self.prompts else 0.0

    def as_record(self, most: int) -> dict[str, Any]:
        """As `audit.json` holds it, with up to `most` pairs of ids of each kind."""
        return {
            "set": self.name,
            "prompts": self.prompts,
            "same": len(self.same),
            "near": len(self.near),
            "same_ids": [list(pair) for pair in self.same[:most]],
            "near_ids": [list(pair) for pair in self.near[:most]],
        }


def pairing(pairs: Sequence[tuple[str, str]]) -> Pairing | None:
    """Compare prompts and answers by the rare words they share; None if too few pairs have enough words.

    Each answer is held against its own prompt and `_OTHERS` others, by the cosine of their words weighted by
    rarity; ties count half. Nothing depends on chance or on the order of the pairs.

    Example:
        >>> names = [f"{a}{b}ton" for a in "abcdefgh" for b in "uvwxyz"]
        >>> told = [(f"Who is {name} really?", f"{name} is one whom they all know so well") for name in names]
        >>> pairing(told).own.value
        1.0
    """
    words = [(_words(prompt), _words(answer)) for prompt, answer in pairs]
    frequency = Counter(word for prompt, _ in words for word in prompt)
    telling = sorted(
        (
            (prompt, answer)
            for prompt, answer in words
            # Words that no prompt has say nothing.
            if len(prompt) >= _LEAST_PROMPT_WORDS and answer & frequency.keys()
            if len(answer) >= _LEAST_ANSWER_WORDS
        ),
        key=_digest,
    )
    if len(telling) < MIN_PAIRS:
        return None
    weights = {word: math.log(1 + len(words) / count) ** 2 for word, count in frequency.items()}
    prompts = [prompt for prompt, _ in telling]
    return Pairing(
        mean(
            [
                _vote(answer, prompt, [prompts[(place + step) % len(prompts)] for step in _steps()], weights)
                for place, (prompt, answer) in enumerate(telling)
            ]
        )
    )


def find_leaks(train: Sequence[Row], sets: Mapping[str, Sequence[Row]]) -> list[Leak]:
    """Which prompts of each set are in the training data too, or in other rows that are given as such."""
    known = {normalised_prompt(row.messages): row.id for row in reversed(train)}
    asked = [(name, row, normalised_prompt(row.messages)) for name, rows in sets.items() for row in rows]
    rest = [(name, row) for name, row, text in asked if text not in known]
    found = near_duplicates((row.prompt for row in train), [row.prompt for _, row in rest])
    near = [(*rest[match.asked], train[match.known].id) for match in found]
    return [
        Leak(
            name,
            len(rows),
            same=tuple((row.id, known[text]) for of, row, text in asked if of == name and text in known),
            near=tuple((row.id, train_id) for of, row, train_id in near if of == name),
        )
        for name, rows in sets.items()
    ]


def judge_leaks(leaks: Sequence[Leak]) -> list[Finding]:
    """What the leaks mean: a set named `valid` is the held-out one, the others are test sets."""
    found = []
    for leak in leaks:
        if leak.same:
            name = "leak-into-valid" if leak.name == "valid" else "leak-into-test"
            evidence = f"{leak.name}: {len(leak.same):,} of {leak.prompts:,} prompts"
            is_mechanical = name == "leak-into-test" and leak.share > _LEAK
            found.append(Finding(name, evidence, is_mechanical=is_mechanical))
    near = [leak for leak in leaks if leak.near_share > _NEAR]
    if near:
        evidence = ", ".join(f"{leak.name}: {len(leak.near):,} of {leak.prompts:,} prompts" for leak in near)
        found.append(Finding("near-duplicates", evidence))
    return found


def judge_chosen_on(leaks: Sequence[Leak]) -> list[Finding]:
    """What it means that test sets have prompts of the held-out one, among which checkpoints are chosen."""
    evidence = "; ".join(
        f"{leak.name}: {len(leak.same):,} of {leak.prompts:,} prompts, and {len(leak.near):,} nearly"
        for leak in leaks
        if leak.same or leak.near_share > _NEAR
    )
    return [Finding("test-in-valid", evidence)] if evidence else []


def judge_prompts(paired: Pairing | None, *, over_long: Figure, controlling: Figure) -> list[Finding]:
    """What is wrong with prompts by themselves and beside their answers.

    Args:
        paired: the test of whose answers they are, where there is one.
        over_long: share over the cap.
        controlling: share with strings that spell control tokens.
    """
    found = []
    if paired is not None and paired.own.value < _SLIPPED:
        evidence = (
            f"of {paired.own.n:,} answers, one is more like its own prompt than like another in "
            f"{100 * paired.own.value:.0f} % of comparisons; 50 % is chance"
        )
        found.append(Finding("mis-paired", evidence))
    if over_long.value > _OVER_LONG:
        found.append(Finding("over-long-prompts", f"{100 * over_long.value:.0f} % of {over_long.n:,}"))
    if controlling.value > 0:
        evidence = f"{round(controlling.value * controlling.n):,} of {controlling.n:,} prompts"
        found.append(Finding("control-strings-in-prompts", evidence))
    return found


def _steps() -> range:
    return range(1, 1 + _OTHERS)


def _words(text: str) -> frozenset[str]:
    """Words without case; of scripts that put no space between words, pairs of characters."""
    words: set[str] = set()
    for word in _WORD.findall(text.casefold()):
        if word[0] < "\u0e00":
            words.add(word)
        else:
            words.update(word[start : start + 2] for start in range(max(len(word) - 1, 1)))
    return frozenset(words)


def _digest(pair: tuple[frozenset[str], frozenset[str]]) -> bytes:
    return hashlib.sha256(
        "\n".join(" ".join(sorted(side)) for side in pair).encode("utf-8", "replace")
    ).digest()


def _vote(
    answer: frozenset[str],
    own: frozenset[str],
    others: Sequence[frozenset[str]],
    weights: Mapping[str, float],
) -> float:
    """Share of other prompts that the answer is less like than its own."""
    likeness = _likeness(answer, own, weights)
    less = [
        (likeness > other) + 0.5 * (likeness == other)
        for other in (_likeness(answer, o, weights) for o in others)
    ]
    return math.fsum(less) / len(less)


def _likeness(answer: frozenset[str], prompt: frozenset[str], weights: Mapping[str, float]) -> float:
    # The answer's own norm is the same for all prompts.
    return math.fsum(weights[word] for word in answer & prompt) / math.sqrt(
        math.fsum(weights[word] for word in prompt)
    )
