"""Changes of format: what they change by hand, and that they change no word."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gadfly.stages.perturbations import PERTURBATIONS, layout, punctuation, white_space


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize(
    ("text", "changed"),
    [("4.", "4.\n"), ("4.\n", "4."), ("4. \n\n", "4."), ("", "\n"), (" ", "")],
)
def test_white_space_is_stripped_or_added_at_the_end(text: str, changed: str) -> None:
    assert white_space(text) == changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("4.", "4,"),
        ("4!", "4."),
        ("4,\n", "4.\n"),
        ("\u56db\u3002", "\u56db\uff0c"),
        ("4", "4"),
        ("", ""),
        ("a, b", "a, b"),
    ],
)
def test_another_mark_closes_the_text(text: str, changed: str) -> None:
    assert punctuation(text) == changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ('{"k": [1, "ü"]}', '{\n  "k": [\n    1,\n    "ü"\n  ]\n}'),
        ('{\n "k": 1}\n', '{"k": 1}'),
        ("one\n\ntwo\n\nthree", "one\ntwo\nthree"),
        ("one\ntwo", "one\n\ntwo"),
        ("one two three", "one two\nthree"),
        ("one\n", "one\n"),
        ("{}", "{}"),
        ("17", "17"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_the_same_is_laid_out_on_other_lines(text: str, changed: str) -> None:
    assert layout(text) == changed


@given(st.text(alphabet=st.sampled_from('ab .,!\n\t{}[]:"1')))
@example('{"a": 1.5e300, "b": "x  y"}')
def test_no_change_touches_a_word(text: str) -> None:
    for name, change in PERTURBATIONS.items():
        changed = change(text)
        if name == "punctuation":
            assert words(changed)[:-1] == words(text)[:-1]
            assert len(changed) == len(text)
            continue
        try:
            assert json.loads(changed) == json.loads(text)
        except ValueError:
            assert words(changed) == words(text)
