import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from gadfly.text_metrics import distinct_fraction, length_ratio, repetition, rouge_l

ascii_texts = st.text(st.sampled_from("abAB01 .,-_\n'"), max_size=60)


def test_rouge_l_equals_the_value_worked_by_hand():
    # Longest common subsequence "the cat the mat": precision 4/6, recall 4/5.
    score = rouge_l("The cat sat on the mat.", "the cat ate the mat")
    assert score == pytest.approx(8 / 11)


@given(ascii_texts, ascii_texts)
def test_rouge_l_of_ascii_text_is_exactly_the_packages(response, reference):
    package = RougeScorer(["rougeL"], use_stemmer=False)
    assert rouge_l(response, reference) == package.score(reference, response)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        ("今天天气很好", "今天天气不好", 5 / 6),
        ("我喜歡 Python", "我喜歡Python", 1),
        ("Привет, мир!", "привет МИР", 1),
        ("नमस्ते दुनिया", "नमस्ते भारत", 1 / 2),
        ("สวัสดี", "สวัสดี", 1),
        ("안녕 세계", "안녕 친구", 1 / 2),
        ("a café", "a cafe\u0301", 1),
        ("a cafe", "a café", 1 / 2),
        ("\uff21\uff22 x²", "ab x2", 1),
    ],
)
def test_rouge_l_reads_every_script(response, reference, score):
    assert rouge_l(response, reference) == pytest.approx(score)


def test_rouge_l_takes_the_best_of_several_references():
    assert rouge_l("a b", ["c d", "a b", "a"]) == 1


@pytest.mark.parametrize(("response", "reference"), [("", "a"), ("a", ""), ("", ""), ("!?", "!?")])
def test_rouge_l_is_zero_where_a_side_has_no_word(response, reference):
    assert rouge_l(response, reference) == 0


@given(st.text(max_size=40), st.text(max_size=40))
def test_rouge_l_is_symmetric_within_bounds_and_one_for_any_word_with_itself(one, other):
    score = rouge_l(one, other)
    assert 0 <= score <= 1
    assert score == pytest.approx(rouge_l(other, one))
    assert rouge_l(one, one) in (0, 1)


def test_rouge_l_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match="no reference"):
        rouge_l("a", [])


def test_repetition_equals_the_value_worked_by_hand():
    # abcd bcda cdab dabc abcd: one of five occurs again.
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)


def test_a_loop_of_one_word_repeats_all_but_one_4_gram():
    assert repetition("no " * 103) == pytest.approx(99 / 100)
    assert repetition("- " * 103) == pytest.approx(99 / 100)
    assert repetition("好" * 103) == pytest.approx(99 / 100)


@pytest.mark.parametrize("text", ["", "a a a", "one two three four five", "今天天气很好"])
def test_few_or_different_words_repeat_nothing(text):
    assert repetition(text) == 0


@given(st.text(max_size=80))
def test_repetition_is_below_one_and_blind_to_white_space(text):
    assert 0 <= repetition(text) < 1
    assert repetition("  " + "\n\n ".join(text.split()) + "\n") == repetition(text)


def test_shuffled_words_repeat_less_than_a_loop():
    words = ["a", "b", "c", "d", "e"] * 20
    shuffled = random.Random(0).sample(words, len(words))
    assert repetition(" ".join(shuffled)) < repetition(" ".join(words))


def test_distinct_fraction_counts_different_texts():
    assert distinct_fraction(["a", "b", "a", "A"]) == 3 / 4


def test_length_ratio_is_of_means_not_of_sums():
    assert length_ratio(["aaaa", ""], ["aa"]) == 1


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        distinct_fraction([])
    with pytest.raises(ValueError, match="0 responses"):
        length_ratio([], ["a"])
    with pytest.raises(ValueError, match="0 characters"):
        length_ratio(["a"], [""])
