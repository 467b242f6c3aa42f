"""Figures of texts that need no model: overlap with a reference, repetition, variety, length.

ROUGE-L is the `rouge-score` package's, over words of its own: the package keeps only a-z and 0-9,
so that every Chinese or Russian text scores 0 and "café" is cut to "caf". Here a word is a run of
letters, digits and their marks in any script, after Unicode NFKC and case folding; scripts that put
no space between words (Han, Kana, Thai, Lao, Khmer, Burmese) count by character. For ASCII text the
figure is exactly the package's.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

_UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")

# Over the kinds of characters (see `_kind`), not the characters.
_WORD = re.compile("cm*|w[wm]*")
_PIECE = re.compile("cm*|[wmo]+")


def rouge_l(response: str, reference: str | Sequence[str]) -> float:
    """ROUGE-L F1 in [0, 1] of a response against its reference, or the best of several.

    Time and memory grow with the product of both lengths in words: 2,000 by 2,000 take about a
    second and 32 MB.

    Raises:
        ValueError: there is no reference.
    """
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415  slow: it imports nltk

    references = [reference] if isinstance(reference, str) else reference
    if not references:
        raise ValueError("rouge_l: no reference given; it needs at least one")
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return float(max(scorer.score(text, response)["rougeL"].fmeasure for text in references))


def repetition(text: str) -> float:
    """Share of repeated word 4-grams, 1 - distinct / all, in [0, 1); 0 for fewer than 4 words.

    A word is what stands between white space, punctuation included (loops of `- - -` count), or one
    character in scripts without spaces.
    """
    words = _pieces(_PIECE, text)
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def distinct_fraction(texts: Sequence[str]) -> float:
    """Share of different texts, in (0, 1].

    Raises:
        ValueError: there is no text.
    """
    if not texts:
        raise ValueError("distinct_fraction: no text given; it needs at least one")
    return len(set(texts)) / len(texts)


def length_ratio(responses: Sequence[str], references: Sequence[str]) -> float:
    """Mean length of the responses over mean length of the references, both in characters.

    Raises:
        ValueError: there is no response, or the references hold no character.
    """
    if not responses or not any(references):
        raise ValueError(
            f"length_ratio: {len(responses)} responses, {sum(map(len, references))} characters of "
            f"references; it needs at least one of each"
        )
    return _mean_length(responses) / _mean_length(references)


def _mean_length(texts: Sequence[str]) -> float:
    return sum(map(len, texts)) / len(texts)


class _Words:
    """A tokenizer as `rouge_score` takes it."""

    def tokenize(self, text: str) -> list[str]:
        return _pieces(_WORD, unicodedata.normalize("NFKC", text).casefold())


def _pieces(pattern: re.Pattern[str], text: str) -> list[str]:
    kinds = "".join(map(_kind, text))
    return [text[found.start() : found.end()] for found in pattern.finditer(kinds)]


@cache
def _kind(character: str) -> str:
    """Letter or digit (w), letter that is a word of its own (c), mark (m), space, or other (o)."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    if category == "M":
        return "m"
    if category not in "LN":
        return "o"
    return "c" if unicodedata.name(character, "").startswith(_UNSPACED_SCRIPTS) else "w"
