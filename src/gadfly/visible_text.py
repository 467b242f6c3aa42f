"""Text of models and data as a terminal or a page may show it: nothing in it hides, acts or breaks a line."""

import unicodedata
from collections.abc import Sequence

# Format characters that text needs: joiners of emoji and Indic or Persian script, direction marks.
_KEPT_FORMAT = "\u200c\u200d\u200e\u200f\u061c"

# Names that an error tells, and characters of each: either may be as long as someone likes.
_MOST_NAMES, _LONGEST_NAME = 10, 80


def visible(text: str) -> str:
    r"""Text with every character that would hide, act or break shown by its number.

    Example:
        >>> print(visible("\x1b[31mred\u202e\ud800"))
        «U+001B»[31mred«U+202E»«U+D800»
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character in "\n\t" or character in _KEPT_FORMAT:
        return character
    hidden = category in ("Cc", "Cf", "Cs", "Zl", "Zp") or code & 0xFFFE == 0xFFFE
    return f"«U+{code:04X}»" if hidden else character


def few(names: Sequence[str]) -> str:
    r"""The first names in one line, each cut to its first characters, and how many more there are.

    Example:
        >>> print(few(["p1", "p\n2"]), few([str(n) for n in range(256)]), sep="; ")
        p1, p«U+000A»2; 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 246 more
    """
    shown = ", ".join(_in_one_line(name[:_LONGEST_NAME]) for name in names[:_MOST_NAMES])
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def _in_one_line(text: str) -> str:
    return visible(text).replace("\n", "«U+000A»").replace("\t", "«U+0009»")
