"""What the surface of an answer gives away: how well one tells teacher from student without reading.

A discriminator that is no better than these features has learnt nothing of the content: it reads an
ending, a length or a habit of layout, and that is what the student will then be rewarded for. The
features hold for any script; none is a matter of what is said.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gadfly.errors import DataError
from gadfly.statistics import Figure, mean
from gadfly.text_metrics import repetition

MIN_PAIRS = 20
"""Fewer pairs than this are refused: the interval would span half the scale."""

_FOLDS = 10
_CARRIERS = 5
# Shares are counted over no more than this: one answer of 10 MB would take seconds, and says no more.
_MOST_CHARACTERS = 20_000
# What fewer training answers have is no habit, and learning it by heart costs accuracy.
_LEAST_SHARE = 0.05
# Of differences scaled to a mean square of 1; between 0.1 and 10 accuracies differ by a point or two.
_INVERSE_REGULARISATION = 1.0

_SENTENCE_ENDS = ".!?\u2026\u3002\uff01\uff1f"
_PER_LINE = {
    "headings": re.compile(r"^ {0,3}#{1,6} ", re.MULTILINE),
    "bullets": re.compile(r"^ *[-*+\u2022] ", re.MULTILINE),
    "numbered_lines": re.compile(r"^ *\d{1,3}[.)] ", re.MULTILINE),
    "code_fences": re.compile(r"^ *(```|~~~)", re.MULTILINE),
    "table_lines": re.compile(r"^ *\|", re.MULTILINE),
}
_PER_CHARACTER = {
    "bold": ("**", "__"),
    "backticks": ("`",),
    "commas": (",", "\uff0c", "\u3001"),
    "colons": (":", ";", "\uff1a", "\uff1b"),
    "brackets": ("(", "[", "{", "\uff08"),
    "exclamation_marks": ("!", "\uff01"),
    "question_marks": ("?", "\uff1f"),
    "straight_quotes": ('"', "'"),
    "curly_quotes": ("\u2018", "\u2019", "\u201c", "\u201d"),
    "long_dashes": ("\u2013", "\u2014"),
    "wide_spaces": ("  ", "\t", "\u00a0"),
}
THINKING = re.compile(r"</?(think|thinking|thought|reasoning|reflection)>", re.IGNORECASE)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Written:
    """An answer as it was written, and whether its author came to the end of it.

    Example:
        >>> Written("It is 4.", finished=True).finished
        True
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class SurfaceTest:
    """How often the surface alone tells which of two answers to a prompt is the teacher's.

    Example:
        >>> SurfaceTest(Figure(0.9, 40, 0.8, 0.97), (("finished", 0.88),)).carriers[0][0]
        'finished'
    """

    accuracy: Figure
    """Share of pairs told, ties half: what a discriminator's accuracy is to be compared with."""
    carriers: tuple[tuple[str, float], ...]
    """The features that tell most when each is looked at by itself, with that share; the best first."""


def surface_features(answer: Written) -> dict[str, float]:
    """The surface of an answer as finite numbers by name; a feature that is left out is 0.

    Lengths and counts of layout marks are logarithms, the rest are shares of characters, or 0 and 1.
    `opens:WORD` says which word it begins with. Beyond 20,000 characters only length and ending count.

    Example:
        >>> features = surface_features(Written("Sure! ", finished=False))
        >>> features["finished"], features["trailing_space"], features["opens:sure"]
        (0.0, 1.0, 1.0)
    """
    whole, text = answer.text, answer.text[:_MOST_CHARACTERS]
    last = whole.rstrip()[-1:]
    first = whole.lstrip()[:1]
    features = {
        "finished": float(answer.finished),
        "characters": math.log1p(len(whole)),
        "words": math.log1p(len(text.split())),
        "lines": math.log1p(whole.count("\n")),
        "blank_lines": math.log1p(whole.count("\n\n")),
        "leading_space": float(whole != whole.lstrip()),
        "trailing_space": float(whole != whole.rstrip()),
        "trailing_newline": float(whole.endswith("\n")),
        "ends_in_full_stop": float(last in _SENTENCE_ENDS and last != ""),
        "ends_in_letter": float(last.isalnum()),
        "begins_in_capital": float(first.isupper()),
        "begins_in_letter": float(first.isalpha()),
        "begins_in_digit": float(first.isdigit()),
        "begins_in_bracket": float(first in "{[" and first != ""),
        "thinking_tags": float(THINKING.search(text) is not None),
        "control_strings": float("<|" in text),
        "repetition": repetition(text),
    }
    features |= {name: math.log1p(len(found.findall(text))) for name, found in _PER_LINE.items()}
    features |= _character_shares(text)
    if opening := _WORD.search(text[:200]):
        features[f"opens:{opening[0].casefold()[:20]}"] = 1.0
    return features


def surface_accuracy(pairs: Sequence[tuple[Written, Written]]) -> SurfaceTest:
    """How well the surface tells the teacher's answer from the student's, on pairs not learnt from.

    A logistic regression on the difference of both answers' features (Bradley-Terry, as the discriminator's
    loss is) learns from nine tenths of the pairs and is asked about the rest. 1 is always, 0.5 cannot tell;
    identical texts give exactly 0.5. Nothing depends on chance or on the order of the pairs. The interval is
    over pairs, as in `tell.py`.

    Args:
        pairs: of the teacher's answer and the student's to one prompt each; a prompt should come once.

    Raises:
        DataError: there are fewer than `MIN_PAIRS` pairs.

    Example:
        >>> pairs = [(Written("a" * n, True), Written("a" * n, False)) for n in range(20)]
        >>> surface_accuracy(pairs).carriers
        (('finished', 1.0),)
    """
    if len(pairs) < MIN_PAIRS:
        raise DataError(
            f"surface test: {len(pairs)} pairs of answers; it needs at least {MIN_PAIRS}. Give more prompts."
        )
    ordered = sorted(pairs, key=_digest)
    names, differences = _differences(ordered)
    # Equal pairs share a fold, so that none is told by having been learnt.
    fold_of = {digest: place % _FOLDS for place, digest in enumerate(dict.fromkeys(map(_digest, ordered)))}
    folds = np.array([fold_of[_digest(pair)] for pair in ordered])
    votes = np.full(len(ordered), 0.5)
    for fold in range(_FOLDS):
        in_fold = folds == fold
        votes[in_fold] = _votes(differences[in_fold] @ _weights(differences[~in_fold]))
    widened = mean([*votes.tolist(), 0.0, 1.0])
    accuracy = Figure(float(votes.mean()), len(votes), max(widened.low, 0.0), min(widened.high, 1.0))
    return SurfaceTest(accuracy, _carriers(names, differences))


def _character_shares(text: str) -> dict[str, float]:
    size = max(len(text), 1)
    letters = [character for character in text if character.isalpha()]
    shares = {
        "letters": len(letters),
        "digits": sum(character.isdigit() for character in text),
        "white_space": sum(character.isspace() for character in text),
        "beyond_ascii": sum(not character.isascii() for character in text),
        "beyond_latin": sum(not _is_latin(character) for character in letters),
        "symbols": sum(unicodedata.category(character) == "So" for character in text if character > "\x7f"),
        "replacement_characters": text.count("\ufffd"),
        **{name: sum(text.count(mark) for mark in marks) for name, marks in _PER_CHARACTER.items()},
    }
    features = {name: count / size for name, count in shares.items()}
    features["capitals"] = sum(map(str.isupper, letters)) / max(len(letters), 1)
    return features


def _is_latin(letter: str) -> bool:
    return letter < "\u0250" or "\u1e00" <= letter <= "\u1eff"


def _digest(pair: tuple[Written, Written]) -> bytes:
    parts = [f"{answer.finished:d}{len(answer.text)} {answer.text}" for answer in pair]
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).digest()


def _differences(
    pairs: Sequence[tuple[Written, Written]],
) -> tuple[list[str], Float[np.ndarray, "pair feature"]]:
    """Teacher's features less the student's, and the length's square: odd may be too long or too short."""
    sides = [tuple(_with_square(surface_features(answer)) for answer in pair) for pair in pairs]
    names = sorted({name for pair in sides for features in pair for name in features})
    table = np.array([[_row(teacher, names), _row(student, names)] for teacher, student in sides])
    return names, table[:, 0] - table[:, 1]


def _with_square(features: Mapping[str, float]) -> dict[str, float]:
    return {**features, "characters_squared": features["characters"] ** 2}


def _row(features: Mapping[str, float], names: Sequence[str]) -> list[float]:
    return [features.get(name, 0.0) for name in names]


def _weights(differences: Float[np.ndarray, "pair feature"]) -> Float[np.ndarray, " feature"]:
    """Weights that tell these pairs; 0 for a feature in which hardly any differ."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  takes a second

    size = np.sqrt((differences**2).mean(axis=0))
    is_used = (differences != 0).mean(axis=0) >= _LEAST_SHARE
    weights = np.zeros(differences.shape[1])
    if is_used.any():
        scaled = differences[:, is_used] / size[is_used]
        # Each pair both ways round, so that no side is preferred.
        both, is_teacher = np.concatenate([scaled, -scaled]), np.arange(2 * len(scaled)) < len(scaled)
        model = LogisticRegression(C=_INVERSE_REGULARISATION, fit_intercept=False, max_iter=1000)
        weights[is_used] = model.fit(both, is_teacher).coef_[0] / size[is_used]
    return weights


def _votes(margins: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    return np.where(margins == 0, 0.5, margins > 0)


def _carriers(
    names: Sequence[str], differences: Float[np.ndarray, "pair feature"]
) -> tuple[tuple[str, float], ...]:
    alone = np.where(differences == 0, 0.5, differences > 0).mean(axis=0)
    shares = sorted(
        ((float(max(share, 1 - share)), name) for name, share in zip(names, alone, strict=True)),
        key=lambda entry: (-entry[0], entry[1]),
    )
    shown = [(name, share) for share, name in shares if share > 0.5 and name != "characters_squared"]
    return tuple(shown[:_CARRIERS])
