"""Rows in tokens: the order of branches, the cap, and what the discriminator reads."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gadfly.chat_template import Renderer
from gadfly.groups import Branch, Group, reread, teacher_group
from gadfly.models import load_language_model
from gadfly.packing import num_response_tokens, num_rows
from gadfly.records import Message, Row, TeacherResponse

END = 2


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    """One token a byte, so that a text of n letters has n tokens and its end of turn."""
    return load_language_model(str(tiny_model), "float32")[1]


def row(*responses: TeacherResponse | str) -> Row:
    taught = [TeacherResponse(r) if isinstance(r, str) else r for r in responses]
    return Row("7", (Message("user", "hi"),), tuple(taught))


def branch(text: str, renderer: Renderer, finished: bool = True) -> Branch:
    return Branch(tuple(renderer.response_tokens(text, finished)), finished, text)


def test_branches_are_teachers_first_then_students(renderer: Renderer) -> None:
    one, two, three = (branch(text, renderer) for text in ("1", "2", "3"))
    group = Group("7", (1,), teachers=(one,), students=(two, three))
    assert group.branches == (one, two, three)
    assert group.only_teachers() == Group("7", (1,), teachers=(one,))
    assert group.only_students() == Group("7", (1,), students=(two, three))


def test_a_row_becomes_its_prompt_and_every_teacher_response_in_order(renderer: Renderer) -> None:
    group = teacher_group(row("ab", "c"), renderer, 10)
    assert group.id == "7"
    assert list(group.prompt_tokens) == renderer.prompt_tokens([Message("user", "hi")])
    assert [(branch.text, branch.finished) for branch in group.teachers] == [("ab", True), ("c", True)]
    assert [len(branch.tokens) for branch in group.teachers] == [3, 2]
    assert group.students == ()


@pytest.mark.parametrize(
    ("cap", "text", "num_tokens", "finished"),
    [
        (5, "abcd", 5, True),
        (4, "abcd", 4, False),
        (3, "abc", 3, False),
    ],
)
def test_a_response_of_exactly_the_cap_stays_finished_and_one_over_it_is_cut_and_unfinished(
    cap: int, text: str, num_tokens: int, finished: bool, renderer: Renderer
) -> None:
    (cut,) = teacher_group(row("abcd"), renderer, cap).teachers
    assert cut.text == text
    assert len(cut.tokens) == num_tokens
    assert cut.finished is finished
    assert (cut.tokens[-1] == END) is finished


def test_a_response_the_teachers_own_limit_cut_is_unfinished_and_has_no_end_of_turn(
    renderer: Renderer,
) -> None:
    (cut,) = teacher_group(row(TeacherResponse("abcd", finished=False)), renderer, 10).teachers
    assert not cut.finished
    assert END not in cut.tokens
    assert len(cut.tokens) == 4


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=12), finished=st.booleans(), cap=st.integers(1, 20))
def test_the_cap_holds_and_end_of_turn_closes_finished_responses_only(
    renderer: Renderer, text: str, finished: bool, cap: int
) -> None:
    (cut,) = teacher_group(row(TeacherResponse(text, finished)), renderer, cap).teachers
    whole = renderer.response_tokens(text, finished)
    assert cut.tokens == tuple(whole[:cap])
    assert cut.finished == (finished and len(whole) <= cap)
    assert (END in cut.tokens) == cut.finished
    assert cut.text == renderer.response_text(cut.tokens)


def test_the_discriminator_reads_one_tokenisation_whatever_ids_a_text_was_sampled_as(
    renderer: Renderer,
) -> None:
    # Another end of turn, and a control token in the middle: the text is the same as the teacher's.
    start = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    letter = renderer.response_tokens("x", finished=False)
    sampled = (*letter, start, 0)
    text = renderer.response_text(sampled)
    assert text == "x<|im_start|>"
    group = Group("7", (1,), teachers=(branch(text, renderer),), students=(Branch(sampled, True, text),))
    (read,) = reread([group], [row(text)], renderer)
    assert read.students[0].tokens == read.teachers[0].tokens
    assert read.students[0].tokens[-1] == END
    assert start not in read.students[0].tokens
    assert list(read.prompt_tokens) == renderer.prompt_tokens([Message("user", "hi")])


def test_reread_text_keeps_its_place_and_finish_and_is_not_cut_again(renderer: Renderer) -> None:
    # Half a character: its replacement is longer than the byte that was sampled.
    byte = tuple(renderer.response_tokens("é", finished=False)[:1])
    text = renderer.response_text(byte)
    students = (Branch(byte, False, text), branch("c", renderer))
    group = Group("7", (1,), teachers=(branch("ab", renderer),), students=students)
    (read,) = reread([group], [row("ab")], renderer)
    assert read.id == "7"
    assert [b.text for b in read.branches] == ["ab", text, "c"]
    assert [b.finished for b in read.branches] == [True, False, True]
    assert len(read.students[0].tokens) > len(byte)
    assert END not in read.students[0].tokens


def test_every_group_needs_its_row_to_be_read(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match="shorter"):
        reread([Group("7", (1,)), Group("8", (1,))], [row("a")], renderer)


def test_rows_and_response_tokens_are_counted_over_all_branches(renderer: Renderer) -> None:
    groups = [teacher_group(row("ab", "c"), renderer, 10), Group("8", (1,))]
    assert num_rows(groups) == 2
    assert num_response_tokens(groups) == 5
