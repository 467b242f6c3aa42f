"""Can teacher and student be told apart? A two-sample test by an independent classifier.

A classifier learns on one half of the held-out prompts which of two answers is the teacher's, and is
tested on the other half. Were both from one distribution, its true accuracy would be 0.5 whatever it
had learned; what it reaches above that is what is left to distil, as far as this classifier can see.

Source: Lopez-Paz and Oquab 2017, arXiv 1610.06545. Theirs differs in that samples come one by one;
here they come in pairs, so the case is the prompt, and prompts, not answers, are split.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gadfly.data.dataset import normalised_prompt, prompt_hash_fraction
from gadfly.errors import DataError
from gadfly.records import Message
from gadfly.statistics import Figure, mean

MIN_PROMPTS = 20
"""Fewer different prompts than this are refused: on 10 test prompts the interval spans half the scale."""

Embed = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "answer feature"]]
"""Prompts and as many responses to finite features, a row an answer; `tell_model.open_embedder` gives one."""

_Answer = tuple[str, str]

# For rows of norm 1 or little more. Between 1 and 100 the accuracy on answers of two teachers differs by
# at most 4 points, by n-grams and by hidden states.
_INVERSE_REGULARISATION = 10.0

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Kana, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


@dataclass(frozen=True)
class Pair:
    """A prompt, as text, with a response of each to tell apart.

    Example:
        >>> Pair("2+2?", teacher="4", student="It is 4.").student
        'It is 4.'
    """

    prompt: str
    teacher: str
    student: str


def tell_accuracy(pairs: Sequence[Pair], embed: Embed | None = None) -> Figure:
    """How often a classifier trained on half of the prompts knows the author of an answer to the others.

    1 is always, 0.5 cannot tell; identical texts give exactly 0.5. The figure's `n` counts test
    prompts, and each has one vote: right on teacher and student 1, on one of them 0.5, a margin of
    exactly 0 counting half. Nothing depends on chance or on the order of the pairs.

    The interval is Student's t over prompts with one prompt of value 0 and one of value 1 added, within
    [0, 1]. The two answers to a prompt are not independent, so a binomial interval over answers can be
    too narrow (it covers 81 % where they are told together) and one over prompts far too wide; the bare t
    interval has no width where all values are equal. This one covers the truth in at least 93.5 % of cases,
    as computed for 10 to 250 prompts whose answers are told together, independently, or never both wrong.

    Args:
        pairs: held-out prompts. Several pairs with a prompt (equal as in `dataset.py`) share its vote.
        embed: features of answers, to be standardised. Without it they are TF-IDF of words and
            characters, one and two in a row, with marks where a text begins and ends, and its length.

    Raises:
        DataError: there are fewer than `MIN_PROMPTS` different prompts.

    Example:
        >>> pairs = [Pair(f"{n}+{n}?", f"{2 * n}", f"{2 * n}") for n in range(40)]
        >>> tell_accuracy(pairs).value
        0.5
    """
    train, test = halves(pairs)
    margins = _margins(_answers(train), _answers(test), embed)
    votes = [
        math.fsum(
            (_right(margins[pair.prompt, pair.teacher]) + _right(-margins[pair.prompt, pair.student])) / 2
            for pair in same
        )
        / len(same)
        for same in _by_prompt(test)
    ]
    widened = mean([*votes, 0.0, 1.0])
    return Figure(math.fsum(votes) / len(votes), len(votes), max(widened.low, 0.0), min(widened.high, 1.0))


def halves(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those to test on: prompts ranked by their hash and cut in the middle.

    Of an odd number of prompts, one more is tested on.

    Raises:
        DataError: there are fewer than `MIN_PROMPTS` different prompts.
    """
    prompts = _by_prompt(pairs)
    if len(prompts) < MIN_PROMPTS:
        raise DataError(
            f"tell: {len(prompts)} different prompts with a response of both; it needs at least "
            f"{MIN_PROMPTS}. Add test prompts, or leave tell out."
        )
    middle = len(prompts) // 2
    train, test = ([pair for same in part for pair in same] for part in (prompts[:middle], prompts[middle:]))
    return train, test


def same_length(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with both responses cut to as many words: half of those of the shorter.

    So what tells them apart is not that one is longer, or was cut by a cap. Only half, since at the full
    length of the shorter its ending (a closing sentence, the last full stop) would still show which one
    it was. White space between the kept words stays. A word is what stands between white space, or one
    character in scripts without it.

    Example:
        >>> same_length([Pair("2+2?", "It  is 4.", "Four is what you look for.")])
        [Pair(prompt='2+2?', teacher='It  is', student='Four is')]
    """
    return [
        Pair(pair.prompt, *(_first_words(text, _kept(pair)) for text in (pair.teacher, pair.student)))
        for pair in pairs
    ]


def _kept(pair: Pair) -> int:
    return math.ceil(min(_num_words(pair.teacher), _num_words(pair.student)) / 2)


def _first_words(text: str, count: int) -> str:
    ends = [found.end() for found in _WORD.finditer(text)]
    return text[: ends[count - 1]] if count else ""


def _num_words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _by_prompt(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs of one prompt together, in an order that follows from their texts alone."""
    prompts: dict[tuple[float, str], list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.prompt, pair.teacher, pair.student)):
        turns = [Message("user", pair.prompt)]
        prompts.setdefault((prompt_hash_fraction(turns), normalised_prompt(turns)), []).append(pair)
    return [prompts[key] for key in sorted(prompts)]


def _answers(pairs: Sequence[Pair]) -> list[_Answer]:
    """The teacher's answers, then as many of the student's."""
    return [(pair.prompt, pair.teacher) for pair in pairs] + [(pair.prompt, pair.student) for pair in pairs]


def _right(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _margins(train: Sequence[_Answer], test: Sequence[_Answer], embed: Embed | None) -> dict[_Answer, float]:
    """How surely each test answer is taken for the teacher's; below 0 it is taken for the student's."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  takes a second
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415

    # Each different answer is looked at once: rounding may differ from row to row, and equal texts
    # must have equal margins.
    answers = list(dict.fromkeys([*train, *test]))
    row = {answer: index for index, answer in enumerate(answers)}
    prompts, responses = zip(*answers, strict=True)
    inputs = np.array(responses, dtype=object) if embed is None else embed(prompts, responses)
    classifier = make_pipeline(
        _text_features() if embed is None else _standard_features(),
        LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=5000),
    )
    is_teacher = np.arange(len(train)) < len(train) // 2
    classifier.fit(inputs[[row[answer] for answer in train]], is_teacher)
    distinct = list(dict.fromkeys(test))
    margins = classifier.decision_function(inputs[[row[answer] for answer in distinct]])
    return dict(zip(distinct, margins.tolist(), strict=True))


def _text_features() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415
    from sklearn.pipeline import FeatureUnion, make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import FunctionTransformer, StandardScaler  # noqa: PLC0415

    shared = {"ngram_range": (1, 2), "preprocessor": _marked, "sublinear_tf": True}
    return FeatureUnion(
        [
            # Punctuation, line breaks and runs of spaces are words too: style is in them.
            ("words", TfidfVectorizer(token_pattern=r"\w+|[^\w\s]|\n+| {2,}", **shared)),
            ("characters", TfidfVectorizer(analyzer="char", **shared)),
            ("length", make_pipeline(FunctionTransformer(_log_lengths), StandardScaler())),
        ],
        # At full weight the length drowns the words where there are few texts to learn from.
        transformer_weights={"length": 0.2},
    )


def _marked(text: str) -> str:
    """The text, in its own case, between the control characters for start and end: both are features."""
    return f"\x02{text}\x03"


def _log_lengths(texts: Iterable[str]) -> Float[np.ndarray, "answer 1"]:
    return np.log1p([[_num_words(text)] for text in texts])


def _standard_features() -> Any:
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import Normalizer, StandardScaler  # noqa: PLC0415

    return make_pipeline(StandardScaler(), Normalizer())
