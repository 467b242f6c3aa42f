import random

from hypothesis import given
from hypothesis import strategies as st

from gadfly.analysis.near_duplicates import SIMILAR, near_duplicates

WORDS = [f"{a}{b}{c}" for a in ("ko", "lu", "ma") for b in ("ri", "sto", "pen") for c in ("da", "vel", "x")]


def text(rng: random.Random, words: int = 14) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def pieces(plain: str) -> set[str]:
    return {plain[start : start + 5] for start in range(len(plain) - 4)}


@given(st.integers(0, 10_000))
def test_every_pair_is_found_that_comparing_all_finds(seed: int) -> None:
    rng = random.Random(seed)
    known = [text(rng) for _ in range(30)]
    asked = []
    for near in known[:4]:
        words = near.split()
        for _ in range(rng.randrange(4)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        asked.append(" ".join(words))
    alike = {}
    for place, one in enumerate(asked):
        likeness = [len(pieces(one) & pieces(k)) / len(pieces(one) | pieces(k)) for k in known]
        if max(likeness) >= SIMILAR:
            alike[place] = max(likeness)
    assert {match.asked: match.similarity for match in near_duplicates(known, asked)} == alike


def test_case_white_space_and_punctuation_do_not_count() -> None:
    (match,) = near_duplicates(
        ["unlike", "Who was Ada Lovelace, really?"], ["who  was ADA Lovelace\n really"]
    )
    assert (match.known, match.similarity) == (1, 1.0)


def test_a_form_filled_with_other_words_is_no_duplicate() -> None:
    form = "Read the following report with care and sum it up in three sentences for a busy person: "
    rng = random.Random(0)
    known, asked = ([form + text(rng, 4) for _ in range(60)] for _ in range(2))
    assert near_duplicates(known, asked) == []
    assert [match.asked for match in near_duplicates([*known, asked[7]], asked)] == [7]


def test_short_questions_that_differ_in_a_word_are_two() -> None:
    assert near_duplicates(["Who is Bob Marley?"], ["Who is Bob Barley?"]) == []


def test_texts_without_words_are_like_nothing() -> None:
    assert near_duplicates(["", "?!", "a"], ["", "...", "b"]) == []
