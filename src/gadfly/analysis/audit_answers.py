"""The teacher's answers beside the student's: shares of what gives a role away without being read.

What the student does is held against it only once it is trained: before, it shows what a base model does.
Shares are compared by their 95 % intervals, so few samples accuse nobody.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gadfly.analysis.audit_findings import Finding
from gadfly.analysis.surface_features import THINKING, SurfaceTest, Written
from gadfly.data.marks import mark_of
from gadfly.statistics import Figure, mean, share

# From here on a share is spoken of. A warning costs a minute, a run without one weeks.
_NOTABLE = 0.05
# And from here on it stops a run, where it is a fact; a guess needs an interval that is all above it.
_MANY = 0.10
# One in a hundred texts with tags or control strings is a habit, not an accident.
_HABIT = 0.01
# Nobody leaves out that many prompts or answers on purpose without knowing.
_MOST_LEFT_OUT = 0.5
# Pairs told by their surface: from here on a discriminator need not read.
_HIGH_ACCURACY = 0.8

_CONTROL = re.compile(r"<\|\w+\|>|<\uff5c[^<>]{1,40}\uff5c>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>")
_MARKDOWN = re.compile(r"^ {0,3}(#{1,6} |[-*+] |\d{1,3}\. |```|\|)|\*\*\S", re.MULTILINE)
_LIST_LINE = re.compile(r"\s*([-*+\u2022|>#]|\d{1,3}[.)]|[a-zA-Z][.)])")
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\u201d\u2019]|$)|[\u3002\uff01\uff1f]")


@dataclass(frozen=True)
class Answer:
    """An answer with its length in the student's tokens, the end-of-turn token included.

    Example:
        >>> Answer(Written("It is 4.", finished=True), tokens=5).written.text
        'It is 4.'
    """

    written: Written
    tokens: int


@dataclass(frozen=True)
class Role:
    """The answers of one role and what can be counted of them.

    Attributes:
        name: `teacher` or `student`.
        figures: shares and means by name, each with its interval.
        quantiles: of the length in tokens, by percent.
    """

    name: str
    figures: dict[str, Figure]
    quantiles: dict[str, int]

    def as_record(self) -> dict[str, object]:
        """As `audit.json` holds it."""
        figures = {name: figure.as_record() for name, figure in self.figures.items()}
        return {"figures": figures, "token_quantiles": self.quantiles}


def describe(name: str, answers: Sequence[Answer], control_strings: Collection[str]) -> Role:
    """Count a role's answers.

    Args:
        name: of the role.
        answers: at least one.
        control_strings: the special tokens of the student's tokenizer, as text.
    """
    texts = [answer.written.text for answer in answers]
    # Where a cap cut a text, what is at its end is the cap's doing.
    whole = [answer.written.text for answer in answers if answer.written.finished]

    def counted(test: Callable[[str], object], among: Sequence[str] = texts) -> Figure | None:
        return share([bool(test(text)) for text in among]) if among else None

    figures = {
        "finished": share([answer.written.finished for answer in answers]),
        "looks_cut": counted(looks_cut, whole),
        "leading_space": counted(lambda text: text != text.lstrip()),
        "trailing_space": counted(lambda text: text != text.rstrip(), whole),
        "empty": counted(lambda text: not text.strip()),
        "several_lines": counted(lambda text: "\n" in text.strip()),
        "markdown": counted(_MARKDOWN.search),
        "thinking_tags": counted(THINKING.search),
        "control_strings": counted(lambda text: has_control_string(text, control_strings)),
        "special_tokens": counted(lambda text: has_control_string(text, control_strings, only_own=True)),
        "other_script": counted(_is_beyond_latin),
        "not_utf8": counted(lambda text: "\ufffd" in text),
        "refusals": counted(lambda text: mark_of(text) == "refusal"),
        "tokens": mean([answer.tokens for answer in answers]),
    }
    return Role(
        name,
        {key: figure for key, figure in figures.items() if figure is not None},
        token_quantiles([answer.tokens for answer in answers]),
    )


def token_quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Lengths that 50, 90, 95, 99 and 100 % of the answers do not exceed.

    Example:
        >>> token_quantiles(range(1, 101))
        {'50': 50, '90': 90, '95': 95, '99': 99, '100': 100}
    """
    percents = (50, 90, 95, 99, 100)
    values = np.percentile(np.array(lengths), percents, method="inverted_cdf")
    return {str(percent): int(value) for percent, value in zip(percents, values, strict=True)}


def looks_cut(text: str) -> bool:
    """Whether a text stops amid a sentence or a block of code, as far as one can see.

    Of answers of six models and of people at most 1.6 % look so, of the same cut at 60 words 30 %.

    Example:
        >>> story = "He went home. He sat down. Then " + "he thought of many things and " * 3
        >>> looks_cut(story + "of"), looks_cut(story + "of home.")
        (True, False)
    """
    text = text.rstrip()
    if text.count("```") % 2:
        return True
    last = text.rsplit("\n", 1)[-1]
    is_prose = len(text.split()) >= 20 and len(last.split()) >= 6 and not _LIST_LINE.match(last)
    return (
        is_prose and len(_SENTENCE_END.findall(text)) >= 2 and (text[-1].isalnum() or text[-1] in ",;:([{-")
    )


def has_control_string(text: str, control_strings: Collection[str], *, only_own: bool = False) -> bool:
    """Whether a text holds a special token of the tokenizer or, unless `only_own`, of another model's."""
    return any(string in text for string in control_strings) or (
        not only_own and _CONTROL.search(text) is not None
    )


def proposed_cap(quantiles: Mapping[str, int]) -> int:
    """A cap in tokens that cuts one answer in a hundred, rounded up to a multiple of 32.

    Example:
        >>> proposed_cap({"99": 175})
        192
    """
    return -(-quantiles["99"] // 32) * 32


def judge_teacher(teacher: Role, student: Role | None, over_cap: Figure, *, drops: bool) -> list[Finding]:
    """What is wrong with the teacher's answers, by themselves and beside the student's.

    Args:
        teacher: its answers as recorded.
        student: fresh samples, if there are any.
        over_cap: share of the teacher's answers over the cap.
        drops: whether these are left out instead of cut.
    """
    figures, found = teacher.figures, []
    marked, guessed = 1 - figures["finished"].value, figures.get("looks_cut")
    seems_cut = guessed is not None and guessed.low > _NOTABLE / 2
    if marked > _NOTABLE or seems_cut:
        evidence = f"{_percent(marked)} are marked so"
        if guessed is not None and seems_cut:
            evidence += f"; of the others {_percent(guessed.value)} stop amid a sentence"
        is_sure = marked > _MANY or (guessed is not None and guessed.low > _MANY)
        found.append(Finding("teacher-cut", evidence, is_mechanical=is_sure))
    if over_cap.value > (_MOST_LEFT_OUT if drops else _NOTABLE):
        does = "are left out" if drops else "are cut and do not teach the student to end"
        evidence = f"{_percent(over_cap.value)} of {over_cap.n:,} {does}"
        is_many = over_cap.value > _MANY and not drops
        found.append(Finding("cap-cuts-teacher", evidence, is_mechanical=is_many))
    if figures["refusals"].low > _HABIT:
        found.append(Finding("refusals", _of(figures["refusals"])))
    for place in ("leading_space", "trailing_space"):
        if place in figures and _is_mark_of(
            figures[place], student.figures.get(place) if student else None, _NOTABLE
        ):
            evidence = _side_by_side(place, teacher, student)
            found.append(Finding("white-space", evidence, is_mechanical=True))
    return [*found, *_judge_tags(teacher, student)]


def _judge_tags(teacher: Role, student: Role | None) -> list[Finding]:
    """Tags and control strings of the teacher's; too few to compare with the student's are told of too."""
    found = []
    for key, name in (("thinking_tags", "thinking-tags"), ("control_strings", "control-strings")):
        one, other = teacher.figures[key], student.figures.get(key) if student else None
        if _is_mark_of(one, other, _HABIT):
            is_habit = one.low > _HABIT
            found.append(Finding(name, _side_by_side(key, teacher, student), is_mechanical=is_habit))
        elif key == "control_strings":
            # Whatever the student does, nobody wants these learnt; of its own, not one.
            if one.value >= _HABIT or teacher.figures["special_tokens"].value > 0:
                found.append(Finding(name, f"{_of(one)} of the teacher"))
        elif one.value >= _HABIT and (other is None or one.value > other.value):
            found.append(Finding(name, f"{_of(one)} of the teacher"))
    return found


def judge_student(teacher: Role, student: Role, *, is_trained: bool) -> list[Finding]:
    """What fresh samples of the student show that the teacher's answers, as trained on, do not.

    Args:
        teacher: its answers as the student learns them, cut at the cap.
        student: the samples.
        is_trained: whether it has learnt from the teacher: only then the fault is mechanical.
    """
    found = []
    ends, own = teacher.figures["finished"], student.figures["finished"]
    if ends.low > own.high and ends.value - own.value > _MANY:
        evidence = (
            f"{_percent(own.value)} of its {own.n} samples end by themselves, {_percent(ends.value)} of its"
        )
        found.append(Finding("student-runs-on", f"{evidence} teacher's answers", is_mechanical=is_trained))
    thinks = student.figures["thinking_tags"]
    if _is_mark_of(thinks, teacher.figures["thinking_tags"], _NOTABLE):
        evidence = _side_by_side("thinking_tags", teacher, student)
        found.append(Finding("thinking-tags", evidence, is_mechanical=is_trained))
    if not is_trained:
        return found
    for place, name in (
        ("leading_space", "white-space"),
        ("trailing_space", "white-space"),
        ("control_strings", "control-strings"),
    ):
        one, other = student.figures.get(place), teacher.figures.get(place)
        if one and _is_mark_of(one, other, _NOTABLE):
            evidence = _side_by_side(place, teacher, student)
            found.append(Finding(name, evidence, is_mechanical=True))
    ratio = student.figures["tokens"].value / teacher.figures["tokens"].value
    if not 0.5 <= ratio <= 2:
        length, its = student.figures["tokens"].value, teacher.figures["tokens"].value
        evidence = f"{length:.0f} tokens, the teacher's {its:.0f}"
        found.append(Finding("lengths-differ", evidence))
    return found


def judge_surface(surface: SurfaceTest | None, *, is_trained: bool) -> list[Finding]:
    """Whether the surface alone tells the roles apart: never mechanical, and expected before training."""
    if surface is None or surface.accuracy.low < _HIGH_ACCURACY:
        return []
    carriers = ", ".join(f"{name} {_percent(value)}" for name, value in surface.carriers[:3])
    evidence = f"{_percent(surface.accuracy.value)} of {surface.accuracy.n} pairs; alone: {carriers}"
    expected = "" if is_trained else "; to be expected of an untrained student"
    return [Finding("told-by-surface", evidence + expected)]


def _is_mark_of(one: Figure, other: Figure | None, notable: float) -> bool:
    """Whether a role has something that the other has not, as far as the samples can tell."""
    return one.value > notable and (other is None or one.low > other.high)


def _is_beyond_latin(text: str) -> bool:
    letters = [letter for letter in text[:2000] if letter.isalpha()]
    return sum(letter > "\u024f" for letter in letters) > len(letters) / 2


def _side_by_side(key: str, teacher: Role, student: Role | None) -> str:
    parts = [
        f"{role.name} {_percent(role.figures[key].value)} of {role.figures[key].n:,}"
        for role in (teacher, student)
        if role is not None and key in role.figures
    ]
    return f"{key.replace('_', ' ')}: {', '.join(parts)}"


def _of(figure: Figure) -> str:
    return f"{round(figure.value * figure.n):,} of {figure.n:,} answers ({_percent(figure.value)})"


def _percent(value: float) -> str:
    return f"{100 * value:.{0 if value >= 0.1 or value == 0 else 1}f} %"
