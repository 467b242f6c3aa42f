"""Changes of an answer that leave what it says as it is: a discriminator should hardly mind them."""

import json
import re
from collections.abc import Callable, Mapping

_CLOSING = {".": ",", "\u3002": "\uff0c", "\uff01": "\u3002", "\uff1f": "\u3002"}
_ENDS_IN_MARK = re.compile(r"([.,;:!?\u2026\u3002\uff0c\uff1b\uff1a\uff01\uff1f])(\s*)\Z")


def white_space(text: str) -> str:
    r"""The text without the white space it ends in, or where it ends in none, with a newline added.

    Example:
        >>> white_space("It is 4. \n"), white_space("It is 4.")
        ('It is 4.', 'It is 4.\n')
    """
    stripped = text.rstrip()
    return stripped if stripped != text else f"{text}\n"


def punctuation(text: str) -> str:
    """The text with another mark at its end; as it is where it ends in none.

    Example:
        >>> punctuation("It is 4."), punctuation("Is it 4?"), punctuation("4")
        ('It is 4,', 'Is it 4.', '4')
    """
    return _ENDS_IN_MARK.sub(lambda found: _CLOSING.get(found[1], ".") + found[2], text)


def layout(text: str) -> str:
    r"""The text on other lines: JSON on one or on many, else paragraphs closer or wider, else two lines.

    Example:
        >>> layout('{"a": 1}'), layout("one\ntwo"), layout("It is 4.")
        ('{\n  "a": 1\n}', 'one\n\ntwo', 'It is\n4.')
    """
    try:
        value = json.loads(text)
        if isinstance(value, (dict, list)) and value:
            return json.dumps(value, ensure_ascii=False, indent=None if "\n" in text.strip() else 2)
    except (ValueError, RecursionError):
        # Not JSON, or too deep to be laid out.
        pass
    body = text.strip()
    if "\n\n" in body:
        return text.replace("\n\n", "\n")
    if "\n" in body:
        return text.replace("\n", "\n\n")
    spaces = [place for place, character in enumerate(text) if character == " "]
    if not spaces:
        return text
    middle = min(spaces, key=lambda place: abs(2 * place - len(text)))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


PERTURBATIONS: Mapping[str, Callable[[str], str]] = {
    "white_space": white_space,
    "punctuation": punctuation,
    "layout": layout,
}
"""By name. Each gives a text back as it is where it has nothing to change in it."""
