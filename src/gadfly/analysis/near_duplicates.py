"""Which texts are nearly the same as a known one: by the share of their five-character pieces, and exactly.

MinHash estimates that share and misses some pairs; here an index over the asked texts finds all of them. Two
texts that have a share t of all their pieces in common have at least t of either's in common, and so one
among the rarest `1 - t` of the asked text's: only those are indexed (prefix filter: Bayardo, Ma and Srikant
2007, "Scaling up all pairs similarity search").
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SIMILAR = 0.8
"""Share of common pieces (Jaccard) from which two texts count as nearly the same."""

_PIECE = 5
# A piece that so many of the asked texts have is of a form that they fill, and says nothing of a text.
_FORM_SHARE, _FORM_TEXTS = 0.1, 5
# Two texts that have most of a few pieces in common may still ask two things; they must be equal.
_LEAST_PIECES = 20
_NOT_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class NearDuplicate:
    """An asked text and the known one most like it, by their places, with the share of common pieces.

    Example:
        >>> NearDuplicate(asked=3, known=17, similarity=0.93).known
        17
    """

    asked: int
    known: int
    similarity: float


def near_duplicates(known: Iterable[str], asked: Sequence[str]) -> list[NearDuplicate]:
    """The asked texts that are nearly the same as a known one, each with its likest, in order.

    Case, accents' encoding, white space and punctuation do not count, nor what a tenth of the asked texts
    have in common; texts with little of their own must be equal. Memory is that of the asked texts; the known
    ones pass by, some 5,000 prompts a second.

    Example:
        >>> near_duplicates(["Tell me all about whales.", "2+2?"], ["tell me all  about: WHALES", "3+3?"])
        [NearDuplicate(asked=0, known=0, similarity=1.0)]
    """
    plain = [_plain(text) for text in asked]
    equal = defaultdict(list)
    for place, text in enumerate(plain):
        if text:
            equal[text].append(place)
    frequency = Counter(piece for text in plain for piece in _pieces(text))
    most = max(_FORM_TEXTS, _FORM_SHARE * len(asked))
    form = {piece for piece, count in frequency.items() if count > most}
    pieces = [_pieces(text) - form for text in plain]
    index = _index(pieces, frequency)
    best: dict[int, NearDuplicate] = {}
    for number, text in enumerate(map(_plain, known)):
        own = _pieces(text) - form
        alike = dict.fromkeys(equal.get(text, ()), 1.0)
        for place in {place for piece in own & index.keys() for place in index[piece]} - alike.keys():
            common = len(own & pieces[place])
            alike[place] = common / (len(own) + len(pieces[place]) - common)
        for place, similarity in alike.items():
            if similarity >= SIMILAR and (place not in best or similarity > best[place].similarity):
                best[place] = NearDuplicate(place, number, similarity)
    return [best[place] for place in sorted(best)]


def _index(pieces: Sequence[set[str]], frequency: Mapping[str, int]) -> dict[str, list[int]]:
    """Where the rarest pieces of each text are; texts that say too little for themselves have none."""
    index: defaultdict[str, list[int]] = defaultdict(list)
    for place, own in enumerate(pieces):
        if len(own) >= _LEAST_PIECES:
            rarest = sorted(own, key=lambda piece: (frequency[piece], piece))
            for piece in rarest[: len(own) - math.ceil(SIMILAR * len(own)) + 1]:
                index[piece].append(place)
    return index


def _plain(text: str) -> str:
    return " ".join(_NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())


def _pieces(plain: str) -> set[str]:
    return {plain[start : start + _PIECE] for start in range(len(plain) - _PIECE + 1)}
