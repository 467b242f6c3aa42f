"""JSON as files hold it, read without trust: it is what was asked for, or a `ValueError` says what it is."""

import json
from collections.abc import Mapping
from typing import Any

from gadfly.visible_text import few

Kind = type | tuple[type, ...]
"""What a value may be; `NoneType` among several says that it may also be missing."""

NUMBER = (int, float)

# Larger whole numbers are none that was written here, and no float holds them.
_MOST = 2**63

# Characters of a value that a message shows.
_SHOWN = 60


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or lists in it are nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The named values of a JSON object.

    Raises:
        ValueError: it is no object.

    Example:
        >>> parse_object('{"step": 3}')
        {'step': 3}
        >>> parse_object("[3]")
        Traceback (most recent call last):
        ValueError: not a JSON object ([3])
    """
    try:
        value = parse(text)
    except ValueError as invalid:
        raise ValueError(f"not a JSON object ({invalid})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object ({_shown(value)})")
    return value


def check_fields(row: object, fields: Mapping[str, Kind], place: str = "") -> None:
    """Refuse a row whose fields are not of the kinds named; fields not named may be anything.

    Args:
        row: as parsed.
        fields: kinds by name.
        place: where in a row this is, to go before the names.

    Raises:
        ValueError: naming the first field that is wrong.

    Example:
        >>> check_fields({"step": "x"}, {"step": int})
        Traceback (most recent call last):
        ValueError: step = 'x': must be int
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place.rstrip('.') or 'it'} = {_shown(row)}: must be an object")
    for name, kind in fields.items():
        value = row.get(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # A truth value is a whole number to Python only.
        is_right = isinstance(value, bool) if bool in kinds else not isinstance(value, bool)
        if not (is_right or value is None) or not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise ValueError(f"{place}{name} = {_shown(value)}: must be {wanted}")
        if isinstance(value, int) and abs(value) >= _MOST:
            raise ValueError(f"{place}{name} = {_shown(value)}: must be below 2**63")


def _shown(value: object) -> str:
    shown = repr(value)
    return few([shown]) if len(shown) <= _SHOWN else f"{few([shown[:_SHOWN]])}…"
