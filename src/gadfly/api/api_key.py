"""The key of an API: read from the environment, and kept out of everything that is shown or stored."""

import os
import re

from gadfly.config import ApiConfig
from gadfly.errors import ConfigError

# So much of a key in one word makes the word unfit to be shown.
_FRAGMENT_CHARACTERS = 6
_LONGEST_CHARACTERS = 200
# Shorter keys are words, such as the "EMPTY" of some local servers, which an answer may well hold.
_SECRET_CHARACTERS = 12
# What looks like a key whosever it is, and what servers show of one: its ends, with stars between.
_ANY_KEY = re.compile(r"\bsk-[\w*.…-]{4,}|\bBearer\s+\S+|\S*\*{3,}\S*", re.IGNORECASE)


class ApiKey:
    """A key that does not show itself.

    Example:
        >>> key = ApiKey("sk-0123456789")
        >>> key, key.hidden_in("wrong key: sk-0123456789")
        (ApiKey(…), 'wrong key: …')
    """

    def __init__(self, value: str):
        """Keep a key; empty where the server wants none."""
        self.value = value
        size = min(_FRAGMENT_CHARACTERS, len(value))
        self._fragments = {value[at : at + size] for at in range(len(value) - size + 1)} - {""}

    @classmethod
    def of(cls, config: ApiConfig, section: str) -> "ApiKey":
        """The key that a section of the recipe names.

        Raises:
            ConfigError: the variable is not set, or holds what can be no key.
        """
        variable = config.api_key_env
        value = os.environ.get(variable, "").strip() if variable else ""
        if variable and not value:
            raise ConfigError(
                f"{section}.api_key_env: the environment variable {variable} is not set; put the key "
                f'there (for a server that wants none: {section}.api_key_env = "")'
            )
        if not re.fullmatch(r"[!-~]*", value):
            raise ConfigError(
                f"{section}.api_key_env: the environment variable {variable} holds a blank, a line break "
                f"or a letter that no key has; put the key alone there"
            )
        return cls(value)

    def hidden_in(self, text: str) -> str:
        """A text as one line of at most 200 characters, without this key or anything that looks like one."""
        # Blanks go first, so that what is cut off here could not have been shown; so does what would act on
        # a terminal.
        plain = "".join(character if character.isprintable() else " " for character in text)
        line = _ANY_KEY.sub("…", " ".join(plain.split())[: 10 * _LONGEST_CHARACTERS])
        words = ("…" if any(part in word for part in self._fragments) else word for word in line.split(" "))
        return " ".join(words)[:_LONGEST_CHARACTERS]

    def removed_from(self, text: str) -> str:
        """A text to be kept, as an answer is, without this key."""
        return text.replace(self.value, "…") if len(self.value) >= _SECRET_CHARACTERS else text

    def __repr__(self) -> str:
        """Nothing of the key."""
        return "ApiKey(…)"
