"""Findings in answers that are made up here, and none in answers of one writer."""

import random
import string
from dataclasses import replace

import pytest

from gadfly.analysis.audit_answers import (
    Answer,
    Role,
    describe,
    judge_student,
    judge_surface,
    judge_teacher,
    looks_cut,
)
from gadfly.analysis.audit_findings import CATALOGUE, Finding
from gadfly.analysis.audit_prompts import (
    Leak,
    find_leaks,
    judge_chosen_on,
    judge_leaks,
    judge_prompts,
    pairing,
)
from gadfly.analysis.surface_features import SurfaceTest, Written
from gadfly.records import Message, Row
from gadfly.statistics import Figure, share

NONE_OVER = share([False] * 200)
CONTROL = ("<|im_end|>",)


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7)))

    return [
        " ".join(" ".join(word() for _ in range(8)).capitalize() + "." for _ in range(rng.randint(2, 5)))
        for _ in range(count)
    ]


def role(name: str, some: list[str], finished: bool = True, tokens: int = 50) -> Role:
    return describe(name, [Answer(Written(text, finished), tokens) for text in some], CONTROL)


def names(findings: list[Finding]) -> list[str]:
    return [finding.name + "!" * finding.is_mechanical for finding in findings]


@pytest.mark.parametrize("seed", range(10))
def test_two_roles_of_one_writer_have_nothing_wrong(seed: int) -> None:
    teacher, student = role("teacher", texts(seed, 200)), role("student", texts(seed + 100, 64))
    assert judge_teacher(teacher, student, NONE_OVER, drops=False) == []
    assert judge_student(teacher, student, is_trained=True) == []


@pytest.mark.parametrize(
    ("planted", "finding"),
    [
        (lambda text: text + " ", "white-space!"),
        (lambda text: "\n\n" + text, "white-space!"),
        (lambda text: "<think>\nhm\n</think>\n\n" + text, "thinking-tags!"),
        (lambda text: text + "<|im_end|>", "control-strings!"),
        (lambda text: text + "\n<|assistant|>\nMore.", "control-strings!"),
    ],
)
def test_what_one_side_has_is_found_on_either_side(planted, finding: str) -> None:  # type: ignore[no-untyped-def]
    clean, odd = texts(0, 100), [planted(text) for text in texts(1, 100)]
    assert names(judge_teacher(role("teacher", odd), role("student", clean), NONE_OVER, drops=False)) == [
        finding
    ]
    assert names(judge_student(role("teacher", clean), role("student", odd), is_trained=True)) == [finding]
    both = role("teacher", odd), role("student", odd)
    # What is a fault of the data stays one, but does not tell the roles apart.
    expected = [finding.rstrip("!")] if finding == "control-strings!" else []
    assert names(judge_teacher(*both, NONE_OVER, drops=False)) == expected
    assert judge_student(*both, is_trained=True) == []


def test_a_student_that_runs_on_counts_once_it_is_trained() -> None:
    teacher, student = role("teacher", texts(0, 100)), role("student", texts(1, 64), finished=False)
    assert names(judge_student(teacher, student, is_trained=False)) == ["student-runs-on"]
    assert names(judge_student(teacher, student, is_trained=True)) == ["student-runs-on!"]


def test_a_thinking_student_is_told_of_before_training() -> None:
    thinking = role("student", ["<think>hm"] * 64)
    assert names(judge_student(role("teacher", texts(0, 64)), thinking, is_trained=False)) == [
        "thinking-tags"
    ]


@pytest.mark.parametrize(
    ("mark", "count", "finding"),
    [
        ("<|im_end|>", 100, "control-strings"),
        ("<|im_end|>", 1, "control-strings"),
        ("[INST]", 20, "control-strings"),
        ("[INST]", 19, None),
        ("<think>", 100, "thinking-tags"),
        ("<think>", 20, "thinking-tags"),
        ("<think>", 19, None),
    ],
)
def test_a_rare_tag_or_control_string_is_a_warning_with_its_count(
    mark: str, count: int, finding: str | None
) -> None:
    some = [*texts(0, 2000 - count), *(text + mark for text in texts(1, count))]
    teacher, student = role("teacher", some), role("student", texts(2, 64))
    found = judge_teacher(teacher, student, NONE_OVER, drops=False)
    assert names(found) == ([finding] if finding else [])
    assert all(f"{count} of 2,000 answers" in one.evidence for one in found)


def test_a_student_that_thinks_as_rarely_as_the_teacher_is_no_fault() -> None:
    teacher = role("teacher", [*texts(0, 1940), *["<think>hm"] * 60])
    student = role("student", [*texts(1, 61), *["<think>hm"] * 3])
    assert judge_teacher(teacher, student, NONE_OVER, drops=False) == []


def test_lengths_that_differ_are_a_warning() -> None:
    teacher, student = role("teacher", texts(0, 64)), role("student", texts(1, 64), tokens=120)
    assert names(judge_student(teacher, student, is_trained=True)) == ["lengths-differ"]


def test_a_cut_amid_a_word_a_list_or_code_looks_so() -> None:
    story = (
        "First we went out. It rained. Then we came back to see "
        + "what had become of the old garden and " * 2
    )
    assert looks_cut(story)
    assert not looks_cut(story + "the end.")
    assert looks_cut("```python\nprint(1)")
    assert not looks_cut("```python\nprint(1)\n```")
    assert not looks_cut("Paris")
    assert not looks_cut(story + "so on.\n- one thing\n- another thing that is longer than the first one was")


def test_few_answers_that_end_oddly_are_no_habit() -> None:
    cut = [text.rstrip(".") + " and then they all went off to" for text in texts(1, 4)]
    teacher = role("teacher", [*texts(0, 196), *cut])
    assert judge_teacher(teacher, None, NONE_OVER, drops=False) == []


def test_leaks_are_exact_or_near_and_only_many_stop_a_run() -> None:
    def prompt(number: str, text: str) -> Row:
        return Row(number, (Message("user", text),))

    long = "Please explain to me in simple words how a {} grows from a seed into a tall plant in one summer"
    train = [prompt("1", "Who are you?"), prompt("2", long.format("sunflower"))]
    asked = [prompt("a", "who ARE  you?"), prompt("b", long.format("sunflowers")), prompt("c", "Why?")]
    (leak,) = find_leaks(train, {"exam": asked})
    assert leak == Leak("exam", 3, same=(("a", "1"),), near=(("b", "2"),))
    assert names(judge_leaks([leak])) == ["leak-into-test!", "near-duplicates"]
    assert names(judge_leaks([replace(leak, prompts=500)])) == ["leak-into-test"]
    assert names(judge_leaks([replace(leak, name="valid", near=())])) == ["leak-into-valid"]


def test_test_prompts_that_checkpoints_are_chosen_on_are_counted() -> None:
    leak = Leak("exam", 200, same=(("a", "1"), ("b", "2")), near=(("c", "3"),))
    (finding,) = judge_chosen_on([leak, replace(leak, name="clean", same=())])
    assert (finding.name, finding.is_mechanical) == ("test-in-valid", False)
    assert finding.evidence == "exam: 2 of 200 prompts, and 1 nearly"
    near = replace(leak, prompts=10, same=())
    assert names(judge_chosen_on([near])) == ["test-in-valid"]


def test_prompts_and_answers_in_any_order_are_paired_alike() -> None:
    some = [(f"Tell me about {text}", f"They say {text}") for text in texts(0, 100)]
    paired = pairing(some)
    assert paired is not None
    assert paired == pairing(some[::-1])
    assert paired.own.value > 0.99
    slipped = pairing([(prompt, some[place - 1][1]) for place, (prompt, _) in enumerate(some)])
    assert slipped is not None
    assert names(judge_prompts(slipped, over_long=NONE_OVER, controlling=NONE_OVER)) == ["mis-paired"]


@pytest.mark.parametrize("answer", ["positive", "42", "yes, it is"])
def test_answers_too_short_to_tell_are_not_judged(answer: str) -> None:
    assert pairing([(text, answer) for text in texts(0, 100)]) is None


def test_chinese_prompts_are_paired_by_their_characters() -> None:
    rng = random.Random(0)
    names_ = ["".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(6)) for _ in range(60)]
    paired = pairing([(f"请告诉我{name}是什么", f"{name}是一个很有名的地方") for name in names_])
    assert paired is not None
    assert paired.own.value > 0.99


def test_the_surface_is_a_warning_before_and_after_training() -> None:
    surface = SurfaceTest(Figure(0.98, 64, 0.93, 1.0), (("finished", 0.97),))
    assert names(judge_surface(surface, is_trained=True)) == ["told-by-surface"]
    (before,) = judge_surface(surface, is_trained=False)
    assert "to be expected" in before.evidence
    assert judge_surface(SurfaceTest(Figure(0.6, 64, 0.5, 0.7), ()), is_trained=True) == []
    assert judge_surface(None, is_trained=True) == []


def test_the_catalogue_tells_what_where_from_and_what_to_do() -> None:
    for entry in CATALOGUE.values():
        assert all((entry.what, entry.cause, entry.advice))
        assert entry.what[0].isupper()
