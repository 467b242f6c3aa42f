"""The demo's teacher, its oracle, and how hard it is for a reader of the last six words."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadfly.demo.scripted_teacher import (
    FIELDS,
    NAMES,
    STYLES,
    Record,
    Verdict,
    judge,
    parse_prompt,
    prompt,
    random_records,
    style_shares,
    teacher_response,
    variety,
    vocabulary,
)

ANNA = Record("anna", ("pasta", None, "nurse", "oslo", "cats"))
PAUL = Record("paul", ("rice", "red", "pilot", "lima", "dogs"))
RECORDS = random_records(seed=5, count=300)


def tell(record: Record, style: str, field: str, phrasing: int) -> str:
    they, their = ("she", "her") if record.name in NAMES["she"] else ("he", "his")
    template = STYLES[style][field][phrasing]
    return template.format(name=record.name, value=record.facts[field], they=they, their=their)


def everything_the_teacher_could_say(record: Record) -> list[str]:
    return [
        " ".join(tell(record, style, *telling) for telling in zip(order, phrasings, strict=True))
        for style in STYLES
        for order in itertools.permutations(record.facts)
        for phrasings in itertools.product((0, 1), repeat=len(order))
    ]


SAID_OF_ANNA = frozenset(everything_the_teacher_could_say(ANNA))


def test_the_teacher_says_only_what_the_oracle_accepts() -> None:
    rng = random.Random(0)
    for record in RECORDS:
        verdict = judge(record, teacher_response(record, rng))
        assert verdict.valid
        assert verdict.why is None
        assert sorted(verdict.order) == sorted(record.facts)


def test_the_teacher_uses_all_it_could_say_evenly() -> None:
    rng = random.Random(0)
    said = Counter(teacher_response(ANNA, rng) for _ in range(20 * len(SAID_OF_ANNA)))
    assert set(said) == SAID_OF_ANNA
    assert len(SAID_OF_ANNA) == 2 * math.factorial(4) * 2**4
    assert max(said.values()) < 60


@given(st.data())
def test_the_oracle_agrees_with_the_list_of_all_answers(data: st.DataObject) -> None:
    words = data.draw(st.sampled_from(sorted(SAID_OF_ANNA))).split()
    some_word = st.sampled_from([*vocabulary(), "", "<end>", "nonsense"])
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(words)))
        replaced = data.draw(st.integers(0, 2))
        words[place : place + replaced] = data.draw(st.lists(some_word, max_size=2))
    text = " ".join(words)
    assert judge(ANNA, text).valid == (text in SAID_OF_ANNA)


@given(st.permutations(["anna keeps cats .", "anna dines on pasta .", "she lives in oslo ."]))
def test_styles_do_not_mix(sentences: list[str]) -> None:
    assert judge(ANNA, " ".join([*sentences, "anna is a qualified nurse ."])).why == "style"


GOOD = "she lives in oslo . she looks after cats . she works as a nurse . she loves to eat pasta ."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD, None),
        (GOOD.removesuffix(" she loves to eat pasta ."), "missing"),
        ("", "missing"),
        (GOOD + " her letters come from oslo .", "repeated"),
        (GOOD.replace("pasta", "rice"), "value"),
        (GOOD + " she always wears red .", "value"),
        (GOOD.replace("she works", "he works"), "person"),
        ("clara keeps cats .", "person"),
        (GOOD.replace("she loves to eat pasta", "anna dines on pasta"), "style"),
        (GOOD + " she", "grammar"),
        (GOOD + " .", "grammar"),
        (GOOD.removesuffix(" ."), "grammar"),
        (GOOD.replace("a nurse", "a nurse nurse"), "grammar"),
        (GOOD.replace(" ", "  ", 1), "grammar"),
        (GOOD + " ", "grammar"),
        (GOOD + "\n", "grammar"),
        (" " + GOOD, "grammar"),
        (GOOD.upper(), "grammar"),
    ],
)
def test_a_slip_has_its_name(text: str, why: str | None) -> None:
    verdict = judge(ANNA, text)
    assert verdict.why == why
    assert verdict.valid == (why is None)


def test_style_and_order_cover_the_text_before_the_slip() -> None:
    verdict = judge(ANNA, "she lives in oslo . she looks after cats . she she .")
    assert verdict == Verdict(False, "grammar", "chatty", ("city", "pet"))
    assert judge(ANNA, "nonsense").style is None


def test_no_sentence_has_two_meanings() -> None:
    meanings = defaultdict(set)
    for record in RECORDS:
        for style, field, phrasing in itertools.product(STYLES, record.facts, (0, 1)):
            person = record.name if style == "formal" else record.name in NAMES["she"]
            sentence = tell(record, style, field, phrasing)
            meanings[sentence].add((style, field, record.facts[field], person))
    assert all(len(meaning) == 1 for meaning in meanings.values())


def test_parsing_inverts_the_prompt_and_all_prompts_are_equally_long() -> None:
    for record in RECORDS:
        assert parse_prompt(prompt(record)) == record
        assert len(prompt(record).split(" ")) == 13


@pytest.mark.parametrize(
    "text",
    [
        "",
        "record",
        "hello there",
        prompt(ANNA) + " ",
        prompt(ANNA).removesuffix(" answer"),
        prompt(ANNA).replace("anna", "zoe"),
        prompt(ANNA).replace("pasta", "red"),
        prompt(ANNA).replace("colour", "shade"),
        prompt(ANNA).replace("pet cats", ""),
        prompt(ANNA) + " pet cats answer",
    ],
)
def test_what_is_no_prompt_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the prompt of a record"):
        parse_prompt(text)


def test_records_are_distinct_and_follow_from_the_seed() -> None:
    assert random_records(seed=5, count=300) == RECORDS
    assert random_records(seed=6, count=300) != RECORDS
    assert len(set(RECORDS)) == len(RECORDS)
    assert {len(record.facts) for record in RECORDS} == {len(FIELDS) - 1, len(FIELDS)}


def test_every_word_is_in_the_vocabulary() -> None:
    rng = random.Random(0)
    words = {
        word for record in RECORDS for word in f"{prompt(record)} {teacher_response(record, rng)}".split(" ")
    }
    assert words == set(vocabulary())
    assert 100 <= len(vocabulary()) <= 130


def test_answers_are_about_26_tokens_and_never_above_40() -> None:
    rng = random.Random(0)
    lengths = [len(teacher_response(record, rng).split()) + 1 for record in RECORDS]
    assert sum(lengths) / len(lengths) == pytest.approx(26, abs=0.6)
    jobless = Record("paul", ("rice", "red", None, "lima", "dogs"))
    texts = everything_the_teacher_could_say(PAUL) + everything_the_teacher_could_say(jobless)
    words = [len(text.split()) for text in texts]
    assert (min(words), max(words)) == (19, 30)


def test_variety_is_the_entropy_of_style_and_first_field() -> None:
    def valid(style: str, field: str) -> Verdict:
        return Verdict(True, None, style, (field, "pet"))

    even = [valid(style, field) for style in STYLES for field in FIELDS]
    invalid = Verdict(False, "missing", "formal", ("food",))
    assert variety(even) == pytest.approx(math.log(10))
    assert variety([*even, invalid]) == pytest.approx(math.log(10))
    assert variety([valid("chatty", "food")] * 3 + [valid("chatty", "pet")]) == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    )
    assert variety([]) == variety([invalid]) == 0


def test_style_shares_count_valid_answers_only() -> None:
    verdicts = [Verdict(True, None, "chatty", ("pet",))] * 3
    verdicts += [Verdict(True, None, "formal", ("pet",)), Verdict(False, "value", "formal", ())]
    assert style_shares(verdicts) == {"chatty": 0.75, "formal": 0.25}
    assert style_shares([]) == {"chatty": 0.0, "formal": 0.0}


def valid_share_of_the_best_imitation(record: Record, memory: int) -> float:
    """Exact, for a reader of the record, the position and the last `memory` words."""
    texts = [[*text.split(), "<end>"] for text in everything_the_teacher_could_say(record)]
    following: dict[tuple[object, ...], Counter[str]] = defaultdict(Counter)

    def seen(text: list[str], place: int) -> tuple[object, ...]:
        return (place, *text[max(place - memory, 0) : place])

    for text in texts:
        for place, word in enumerate(text):
            following[seen(text, place)][word] += 1
    share = 0.0
    for text in texts:
        counts = [(following[seen(text, place)], word) for place, word in enumerate(text)]
        share += math.prod(count[word] / count.total() for count, word in counts)
    return share


def test_the_best_imitation_with_six_words_of_memory_gets_a_fifth_right() -> None:
    values: list[str | None] = list(PAUL.values)
    lacking = [Record("paul", (*values[:gap], None, *values[gap + 1 :])) for gap in range(len(values))]
    shares = [valid_share_of_the_best_imitation(record, memory=6) for record in lacking]
    with_four = sum(shares) / len(shares)
    with_five = valid_share_of_the_best_imitation(PAUL, memory=6)
    assert (with_four + with_five) / 2 == pytest.approx(0.206, abs=0.001)
    assert valid_share_of_the_best_imitation(lacking[0], memory=40) == pytest.approx(1)


@pytest.mark.parametrize("style", STYLES)
def test_six_words_are_enough_for_one_who_always_tells_in_one_order(style: str) -> None:
    for record in RECORDS:
        text = [tell(record, style, field, 0) for field in record.facts]
        words = [*" ".join(text).split(), "<end>"]
        following = defaultdict(set)
        for place, word in enumerate(words):
            following[tuple(words[max(place - 6, 0) : place])].add(word)
        assert all(len(choices) == 1 for choices in following.values())


def test_the_teacher_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, gadfly.demo.scripted_teacher\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
