"""What one row of a data set may look like, and the prompt and teacher responses it holds.

The prompt is `messages` (a list of role and content), `prompt` (text, or such a list) or `content`
(such a list); of several the first in this order that is not null, since `messages` beside a
`prompt` text is the whole conversation. The teacher's words are `response`, `teacher_response` or
`responses`: one text, one object with `response`, `text` or `content`, or a list of those; of several
of these fields one must hold all that the others do. Several responses to a prompt go into one row, as
such a list: a second row of a prompt is left out as a duplicate. Without any of them, a last turn of the
assistant is the response. Every turn is kept as it is; fields not named here are not read.
"""

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from gadfly.data.marks import CUT, WITHHELD
from gadfly.records import Message, Row, TeacherResponse

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a prompt."""

_PROMPTS = ("messages", "prompt", "content")
_RESPONSES = ("response", "teacher_response", "responses")
_RESPONSE_TEXTS = ("response", "text", "content")

FIELDS = ("id", *_PROMPTS, *_RESPONSES, "finish_reason", "teacher", "mark", "sample_index")
"""Every field that is read; the columns to ask of a wide table."""

# Short and printable whatever the value: it may be 10 MB long or nested a thousand deep.
_EXCERPT = reprlib.Repr()
_EXCERPT.maxstring = _EXCERPT.maxother = 80


class BadField(ValueError):
    """Why a row, or one of its responses, cannot be used.

    Attributes:
        reason: a fixed slug: broken-json, invalid-utf-8, wrong-type, no-prompt, empty-prompt,
            bad-role, assistant-last, no-response, ambiguous-response, empty-response,
            content-filter, duplicate-prompt, or a mark of `marks.py`.
        detail: where in the row, with a short excerpt of the value.
    """

    def __init__(self, reason: str, detail: str):
        """Keep both parts; the message joins them."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def excerpt(value: object) -> str:
    """The value in at most a hundred printable characters."""
    return _EXCERPT.repr(value)[:100]


def parse_row(
    fields: object, *, needs_response: bool, train_on: Collection[str] = ()
) -> tuple[Row | None, list[BadField]]:
    """Read one row; its `id` is empty where none is given.

    A row that `collect` marked (`marks.py`) is bad for that reason, unless its mark is in `train_on`.

    A bad response is left out alone. The row is None if its prompt is bad, or if no response is
    left and `needs_response` is true; the list says why, and is empty only for a row without fault.
    """
    bad: list[BadField] = []
    try:
        if not isinstance(fields, Mapping):
            raise BadField("wrong-type", f"not an object of named fields: {excerpt(fields)}")
        mark = fields.get("mark")
        if mark is not None and mark not in train_on:
            raise BadField(
                _text(mark, "mark"), f"marked so when it was collected: {excerpt(fields.get('response'))}"
            )
        turns = _turns(fields)
        try:
            given = _given_responses(fields)
        except BadField as fault:
            given, bad = [], [fault]
        if given is None:
            given = [turns.pop().content] if turns and turns[-1].role == "assistant" else []
        _check_prompt(turns)
        if needs_response and not given and not bad:
            raise BadField("no-response", f"none of {', '.join(_RESPONSES)} is given")
        responses = []
        reasons = _for_each(fields, "finish_reason", len(given))
        refused = WITHHELD | ({"refusal"} - set(train_on))
        teachers = _for_each(fields, "teacher", len(given))
        for number, item in enumerate(given):
            try:
                responses.append(_response(item, reasons[number], teachers[number], refused))
            except BadField as fault:
                place = f"response {number + 1} of {len(given)}: " if len(given) > 1 else ""
                bad.append(BadField(fault.reason, place + fault.detail))
        row = Row(_identity(fields.get("id")), tuple(turns), tuple(responses))
    except BadField as fault:
        return None, [fault]
    return (row if responses or not needs_response else None), bad


def _turns(fields: Mapping[Any, Any]) -> list[Message]:
    key = _first_given(fields, _PROMPTS)
    if key is None:
        raise BadField("no-prompt", f"fields: {excerpt(list(fields))}")
    turns = fields[key]
    if key == "prompt" and isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        raise BadField("wrong-type", f"{key}: {excerpt(turns)}")
    return [_message(turn, f"{key}[{number}]") for number, turn in enumerate(turns)]


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadField("wrong-type", f"{where}: {excerpt(turn)}")
    role = _text(turn.get("role"), f"{where}.role")
    if role not in ROLES:
        raise BadField("bad-role", f"{where}.role: {excerpt(role)}")
    return Message(role, _text(turn.get("content"), f"{where}.content"))


def _check_prompt(turns: list[Message]) -> None:
    if not turns:
        raise BadField("empty-prompt", "no turn")
    if turns[-1].role == "assistant":
        raise BadField("assistant-last", excerpt(turns[-1].content))
    # A blank system turn is common and harmless; a blank question has no answer.
    for number, turn in enumerate(turns, start=1):
        if not turn.content.strip() and (turn.role == "user" or number == len(turns)):
            raise BadField("empty-prompt", f"turn {number} ({turn.role}): {excerpt(turn.content)}")


def _given_responses(fields: Mapping[Any, Any]) -> list[Any] | None:
    given = {key: _as_list(fields[key]) for key in _RESPONSES if fields.get(key) is not None}
    if not given:
        return None
    fullest = max(given, key=lambda key: len(given[key]))
    for key, responses in given.items():
        if any(response not in given[fullest] for response in responses):
            raise BadField(
                "ambiguous-response",
                f"{key}: {excerpt(fields[key])}, {fullest}: {excerpt(fields[fullest])}; "
                f"put all responses to a prompt into one list",
            )
    return given[fullest]


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _response(
    item: object, finish_reason: object, teacher: object, refused: Collection[str]
) -> TeacherResponse:
    if isinstance(item, Mapping):
        finish_reason = _or_else(item.get("finish_reason"), finish_reason)
        teacher = _or_else(item.get("teacher"), teacher)
        key = _first_given(item, _RESPONSE_TEXTS)
        item = None if key is None else item[key]
    reason = None if finish_reason is None else _text(finish_reason, "finish_reason")
    reason = None if reason is None else reason.casefold()
    if reason in refused:
        raise BadField("content-filter", f"finish_reason: {reason}; response: {excerpt(item)}")
    if item is None:
        raise BadField("no-response", "null, or without text")
    text = _text(item, "response")
    if not text.strip():
        raise BadField("empty-response", excerpt(text))
    return TeacherResponse(
        text,
        finished=reason not in CUT,
        teacher=None if teacher is None else _text(teacher, "teacher"),
    )


def _identity(given: object) -> str:
    if isinstance(given, Mapping | list):
        raise BadField("wrong-type", f"id: {excerpt(given)}")
    return "" if given is None else _text(str(given), "id")


def _for_each(fields: Mapping[Any, Any], key: str, count: int) -> list[Any]:
    """The field's value for each response: one value holds for all, a list is parallel to them."""
    value = fields.get(key)
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadField("wrong-type", f"{key}: {len(value)} values for {count} responses")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadField("wrong-type", f"{where}: {excerpt(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # A JSON escape such as \ud800 gives half a character, which no UTF-8 file can hold.
        raise BadField("invalid-utf-8", f"{where}: {excerpt(value)}") from None
    return value


def _first_given(fields: Mapping[Any, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if fields.get(key) is not None), None)


def _or_else(value: object, default: object) -> object:
    return default if value is None else value
