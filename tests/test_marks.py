"""Which answers are kept but not trained on."""

import pytest

from gadfly.data.marks import mark_of


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist with that request.",
        "I am very sorry, but I am unable to do this.",
        "Sorry, I cannot provide instructions for that.",
        "I can't help with that.",
        "I cannot assist you.",
        "I can not comply with this request.",
        "I won't write that.",
        "I am not able to discuss this topic.",
        "As an AI language model, I cannot have opinions.",
        "  \n I must decline to answer.",
    ],
)
def test_a_short_answer_that_opens_like_a_refusal_is_one(text: str) -> None:
    assert mark_of(text) == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "Sorry is the hardest word.",
        "I can't help but smile when I think of it.",
        "I can't help falling in love with you: Elvis Presley, 1961.",
        "I can help you write that.",
        "As an AI, I find this fascinating: let us begin.",
        "The witness said: I'm sorry, but I can't help with that.",
        "I'm sorry, but I can't say that without a story. " + "Once upon a time. " * 40,
        "I'm sorry to hear that. Here is what you could do next.",
    ],
)
def test_an_answer_is_no_refusal(text: str) -> None:
    assert mark_of(text) is None


def test_what_the_api_says_goes_before_what_the_text_looks_like() -> None:
    assert mark_of("a whole answer", "stop", refusal="No.") == "refusal"
    assert mark_of("a whole answer", "refusal") == "refusal"
    assert mark_of("I'm sorry, but I can't help with that.", "content_filter") == "content-filter"
    assert mark_of("", "SAFETY") == "content-filter"


def test_an_answer_that_the_limit_cut_is_marked_and_an_unknown_end_is_not() -> None:
    assert mark_of("and then", "length") == "cut"
    assert mark_of("and then", "MAX_TOKENS") == "cut"
    assert mark_of("and then", None) is None
    assert mark_of("and then", "stop") is None


def test_an_answer_without_text_is_empty_however_it_ended() -> None:
    assert [mark_of(" \n", reason) for reason in ("stop", "length", None)] == ["empty"] * 3
