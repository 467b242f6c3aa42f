"""Which of two answers is better, asked in both orders.

The protocol, its marks [[A]], [[B]] and [[C]], and `prompts/pairwise.txt` are MT-Bench's (Zheng et
al. 2023, arXiv 2306.05685, figure 5): a judge tends to favour the place, so an answer wins only if
it is preferred in both.
"""

import re
from typing import Literal

from gadfly.analysis.win_rates import Outcome
from gadfly.stages.judge.judge_prompt import after_reasoning

Preference = Literal["first", "second", "tie"]
"""Which answer the judge preferred, by the place where it read it."""

_PREFERENCES: dict[str, Preference] = {"[[A]]": "first", "[[B]]": "second", "[[C]]": "tie"}
_MARK = re.compile(r"\[\[[ABC]\]\]")

# The outcome for A by its place, then by what the judge preferred.
_WHERE_A_IS_FIRST: dict[Preference, Outcome] = {"first": "win", "second": "loss", "tie": "tie"}
_WHERE_A_IS_SECOND: dict[Preference, Outcome] = {"first": "loss", "second": "win", "tie": "tie"}


def parse_preference(text: str) -> Preference | None:
    r"""What a judge's answer prefers; None if it does not say so: then ask again, never guess.

    One of [[A]], [[B]] and [[C]] must stand on its first or last line, and no other mark anywhere.
    What is in `<think>…</think>` before it does not count.

    Example:
        >>> parse_preference("B is wrong.\nFinal verdict: **[[A]]**"), parse_preference("[[A]] or [[B]]")
        ('first', None)
    """
    answer = after_reasoning(text).strip()
    marks = set(_MARK.findall(answer))
    if len(marks) != 1:
        return None
    (mark,) = marks
    lines = answer.splitlines()
    return _PREFERENCES[mark] if mark in lines[0] or mark in lines[-1] else None


def outcome(a_first: Preference | None, a_second: Preference | None) -> Outcome | None:
    """How A fares against B on one prompt; None if either verdict is missing.

    Verdicts that disagree are a tie, also where only one of them is one.

    Args:
        a_first: the verdict where the judge read A first.
        a_second: the verdict where it read A second.

    Example:
        >>> outcome("first", "second"), outcome("first", "first"), outcome("first", None)
        ('win', 'tie', None)
    """
    if a_first is None or a_second is None:
        return None
    one, other = _WHERE_A_IS_FIRST[a_first], _WHERE_A_IS_SECOND[a_second]
    return one if one == other else "tie"
