"""The demo's teacher tells the facts of a record, and an exact oracle knows all it would ever say.

A record is a name and five fields, four or five of them present. The teacher picks one of two
styles, tells each present fact once, in any order, and ends. The styles share no sentence; each has
two phrasings of a fact. So what may come next depends on everything said so far, and the last few
words do not show which facts are left.

Every token is one word between single spaces; the full stop is a word.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

FIELDS: dict[str, tuple[str, ...]] = {
    "food": ("pasta", "rice", "soup", "salad", "bread", "cheese", "sushi", "curry"),
    "colour": ("red", "blue", "green", "yellow", "purple", "black", "white", "pink"),
    "job": ("baker", "nurse", "pilot", "tailor", "farmer", "singer", "lawyer", "painter"),
    "city": ("rome", "paris", "tokyo", "cairo", "lima", "oslo", "delhi", "boston"),
    "pet": ("cats", "dogs", "horses", "parrots", "rabbits", "hamsters", "turtles", "goats"),
}
"""What a record may hold: each field and its values."""

NAMES: dict[str, tuple[str, ...]] = {
    "she": ("anna", "clara", "emma", "lucy", "maria", "nora", "ruth", "sofia"),
    "he": ("adam", "carl", "david", "felix", "henry", "oscar", "paul", "tom"),
}
"""The names, by the pronoun that stands for them."""

STYLES: dict[str, dict[str, tuple[str, str]]] = {
    "chatty": {
        "food": ("{they} loves to eat {value} .", "{their} fridge holds only {value} ."),
        "colour": ("{they} always wears {value} .", "{they} painted {their} door {value} ."),
        "job": ("{they} works as a {value} .", "{their} card says {value} ."),
        "city": ("{they} lives in {value} .", "{their} letters come from {value} ."),
        "pet": ("{they} looks after {value} .", "{their} best friends are {value} ."),
    },
    "formal": {
        "food": ("{name} dines on {value} .", "{name} has ordered some {value} ."),
        "colour": ("{name} prefers {value} clothes .", "{name} chose the colour {value} ."),
        "job": ("{name} is a qualified {value} .", "{name} is employed as {value} ."),
        "city": ("{name} resides in {value} .", "{name} was born near {value} ."),
        "pet": ("{name} keeps {value} .", "{name} owns several {value} ."),
    },
}
"""For each style and field, the two ways to tell the fact.

No sentence has more than six words: a reader of the last six sees style and fact of the sentence
just ended, and hardly more. With that, even perfect imitation of the teacher gets one answer in five
right (20.6 %), while one who always tells in the same order can get them all.
"""

_POSSESSIVES = {"she": "her", "he": "his"}
_PRONOUNS = {name: pronoun for pronoun, names in NAMES.items() for name in names}
_ABSENT = {field: f"no-{field}" for field in FIELDS}


@dataclass(frozen=True)
class Record:
    """What a prompt asks about: a name, and a value or None for each field, in `FIELDS` order.

    Example:
        >>> Record("anna", ("pasta", None, "nurse", "oslo", "cats")).facts["job"]
        'nurse'
    """

    name: str
    values: tuple[str | None, ...]

    @property
    def facts(self) -> dict[str, str]:
        """The present fields and their values."""
        pairs = zip(FIELDS, self.values, strict=True)
        return {field: value for field, value in pairs if value is not None}


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of one response.

    `why` is None if valid, else the first slip in the text: `grammar` (no sentence of the teacher),
    `value` (not this record's), `person` (another name or pronoun), `style` (not the one begun),
    `repeated`, or at the end `missing`. `style` and `order` (the fields as told) cover the text
    before the slip; `style` is None if no fact was told.
    """

    valid: bool
    why: str | None
    style: str | None
    order: tuple[str, ...]


@dataclass(frozen=True)
class _Telling:
    """What one sentence says, and the name or pronoun it says it of."""

    style: str
    field: str
    value: str
    person: str


def random_records(seed: int, count: int) -> list[Record]:
    """`count` distinct records, about half of them without one field. The seed decides them."""
    rng = random.Random(seed)
    names = list(_PRONOUNS)
    records: dict[Record, None] = {}
    while len(records) < count:
        values: list[str | None] = [rng.choice(choices) for choices in FIELDS.values()]
        if rng.random() < 0.5:
            values[rng.randrange(len(values))] = None
        records[Record(rng.choice(names), tuple(values))] = None
    return list(records)


def prompt(record: Record) -> str:
    """The record as the models read it: 13 words, whatever is absent.

    Example:
        >>> prompt(Record("anna", ("pasta", None, "nurse", "oslo", "cats")))
        'record anna food pasta colour no-colour job nurse city oslo pet cats answer'
    """
    words = ["record", record.name]
    for field, value in zip(FIELDS, record.values, strict=True):
        words += [field, _ABSENT[field] if value is None else value]
    return " ".join([*words, "answer"])


def parse_prompt(text: str) -> Record:
    """The record that `prompt` wrote as `text`.

    Raises:
        ValueError: if no record is written so.
    """
    words = text.split(" ")
    values = zip(FIELDS, words[3:-1:2], strict=False)
    record = Record(
        name=words[1] if len(words) > 1 else "",
        values=tuple(None if value == _ABSENT[field] else value for field, value in values),
    )
    known = record.name in _PRONOUNS and len(record.values) == len(FIELDS)
    known = known and all(value in FIELDS[field] for field, value in record.facts.items())
    if not known or prompt(record) != text:
        raise ValueError(f"not the prompt of a record: {text!r}")
    return record


def teacher_response(record: Record, rng: random.Random) -> str:
    """One answer of the teacher, 19 to 30 words; style, order and phrasings are drawn evenly."""
    facts = list(record.facts.items())
    rng.shuffle(facts)
    phrasings = STYLES[rng.choice(list(STYLES))]
    return " ".join(_sentence(rng.choice(phrasings[field]), record.name, value) for field, value in facts)


def judge(record: Record, response: str) -> Verdict:
    """Whether the teacher could have written exactly this, and if not, its first slip.

    Example:
        >>> record = Record("anna", ("pasta", None, "nurse", "oslo", "cats"))
        >>> judge(record, "anna keeps cats . anna keeps cats .").why
        'repeated'
    """
    style = None
    order: list[str] = []
    for sentence in _split(response):
        telling = _TELLINGS.get(sentence)
        why = None
        if telling is None:
            why = "grammar"
        elif record.facts.get(telling.field) != telling.value:
            why = "value"
        elif telling.person not in (record.name, _PRONOUNS[record.name]):
            why = "person"
        elif style not in (None, telling.style):
            why = "style"
        elif telling.field in order:
            why = "repeated"
        if telling is None or why:
            return Verdict(False, why, style, tuple(order))
        style = telling.style
        order.append(telling.field)
    is_complete = len(order) == len(record.facts)
    return Verdict(is_complete, None if is_complete else "missing", style, tuple(order))


def variety(verdicts: Iterable[Verdict]) -> float:
    """Entropy (nats) of style and first field among the valid answers; 0 without any.

    The teacher's, the highest there is, is ln 10 = 2.30.
    """
    counts = Counter((verdict.style, verdict.order[0]) for verdict in verdicts if verdict.valid)
    shares = [count / counts.total() for count in counts.values()]
    return sum((-share * math.log(share) for share in shares), 0.0)


def style_shares(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Share of each style among the valid answers (the teacher's: a half each); 0 without any."""
    counts = Counter(verdict.style for verdict in verdicts if verdict.valid)
    return {style: counts[style] / max(counts.total(), 1) for style in STYLES}


def vocabulary() -> list[str]:
    """Every word of prompts and responses, sorted; special tokens are the tokenizer's."""
    words = {"record", "answer", *FIELDS, *_ABSENT.values(), *_PRONOUNS}
    for sentence in _TELLINGS:
        words.update(sentence.split())
    return sorted(words)


def _sentence(template: str, name: str, value: str) -> str:
    pronoun = _PRONOUNS[name]
    return template.format(name=name, value=value, they=pronoun, their=_POSSESSIVES[pronoun])


def _split(response: str) -> list[str]:
    """The sentences, each with its full stop; a rest without one is a sentence too."""
    sentences: list[str] = []
    words: list[str] = []
    for word in response.split(" ") if response else []:
        words.append(word)
        if word == ".":
            sentences.append(" ".join(words))
            words = []
    return [*sentences, " ".join(words)] if words else sentences


def _all_tellings() -> dict[str, _Telling]:
    """Every sentence the teacher has for anyone, with its one meaning."""
    tellings = {}
    for style, phrasings in STYLES.items():
        for field, templates in phrasings.items():
            for template in templates:
                for name, pronoun in _PRONOUNS.items():
                    person = name if "{name}" in template else pronoun
                    for value in FIELDS[field]:
                        telling = _Telling(style, field, value, person)
                        tellings[_sentence(template, name, value)] = telling
    return tellings


_TELLINGS = _all_tellings()
