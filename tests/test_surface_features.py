import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadfly.analysis.surface_features import MIN_PAIRS, Written, surface_accuracy, surface_features
from gadfly.errors import DataError

WORDS = ["the", "a", "cat", "dog", "sees", "runs", "and", "far", "away", "under", "blue", "old", "house"]


def sentence(rng: random.Random, words: int = 12) -> str:
    return (" ".join(rng.choices(WORDS, k=words)) + ".").capitalize()


def pairs(seed: int, count: int = 100) -> list[tuple[Written, Written]]:
    """Two answers to each prompt by one and the same writer."""
    rng = random.Random(seed)
    return [
        (Written(sentence(rng, rng.randint(5, 20)), True), Written(sentence(rng, rng.randint(5, 20)), True))
        for _ in range(count)
    ]


def test_identical_texts_are_told_half_the_time() -> None:
    same = [(teacher, teacher) for teacher, _ in pairs(0)]
    test = surface_accuracy(same)
    assert test.accuracy.value == 0.5
    assert test.carriers == ()


@pytest.mark.parametrize("seed", range(5))
def test_answers_of_one_writer_cannot_be_told(seed: int) -> None:
    accuracy = surface_accuracy(pairs(seed)).accuracy
    assert accuracy.low < 0.5 < accuracy.high


@pytest.mark.parametrize(
    ("change", "carrier"),
    [
        (lambda text: Written(text, False), "finished"),
        (lambda text: Written(text + "\n", True), "trailing_newline"),
        (lambda text: Written(" " + text, True), "leading_space"),
        (lambda text: Written(text.rstrip("."), True), "ends_in_full_stop"),
        (lambda text: Written("- " + text, True), "bullets"),
        (lambda text: Written("Sure! " + text, True), "opens:sure"),
        (lambda text: Written(text + " " + text + " " + text + " " + text, True), "repetition"),
    ],
)
def test_a_habit_of_one_side_is_told_and_named(change, carrier: str) -> None:  # type: ignore[no-untyped-def]
    test = surface_accuracy([(teacher, change(student.text)) for teacher, student in pairs(1)])
    assert test.accuracy.value > 0.95
    assert carrier in dict(test.carriers)


def test_lengths_around_the_teachers_are_told_too() -> None:
    rng = random.Random(2)
    written = [
        (Written(sentence(rng, rng.randint(19, 21)), True), Written(sentence(rng, rng.choice((5, 60))), True))
        for _ in range(100)
    ]
    assert surface_accuracy(written).accuracy.value > 0.9


def test_neither_order_nor_chance_matters() -> None:
    some = pairs(3)
    assert surface_accuracy(some) == surface_accuracy(some[::-1]) == surface_accuracy(some)


def test_few_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="19 pairs of answers; it needs at least 20"):
        surface_accuracy(pairs(0, MIN_PAIRS - 1))


@given(st.text(), st.booleans())
def test_the_features_of_any_text_are_finite(text: str, finished: bool) -> None:
    features = surface_features(Written(text, finished))
    assert all(math.isfinite(value) for value in features.values())
    assert features["finished"] == finished


def test_ten_megabytes_on_one_line_take_no_time() -> None:
    started = time.perf_counter()
    surface_features(Written("ab <|x " * 1_500_000, True))
    assert time.perf_counter() - started < 5
