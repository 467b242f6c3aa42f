"""What is said to a judge, from a text file with places to fill in, and what it says after thinking.

A prompt file holds what the system says and what the user says, with the line `=== user ===` between
them; without that line the user says it all, for models that know no system role. A word in braces
is a placeholder: {prompt}, {first} and {second}, each at least once. They are filled in one pass, so
what a prompt or an answer holds is never filled itself, and any other brace is just a brace.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from gadfly.errors import ConfigError
from gadfly.records import Message

DEFAULT_PROMPTS = ("score", "pairwise")
"""Names of the prompts that come with gadfly; `prompts/NAME.txt` beside this file."""

_MARKER = "=== user ==="
_PLACES = ("prompt", "first", "second")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class JudgePrompt:
    """A judge's instructions with places for a prompt and the two answers to it.

    Example:
        >>> better = JudgePrompt("Be fair.", "{prompt} A: {first} B: {second}")
        >>> better.fill(prompt="2+2?", first="4", second="{first}")[1].content
        '2+2? A: 4 B: {first}'
    """

    system: str
    """Empty where there is no system message."""
    user: str

    def fill(self, *, prompt: str, first: str, second: str) -> list[Message]:
        """The messages to send, with `first` as the answer the judge reads first."""
        values = {"prompt": prompt, "first": first, "second": second}
        parts = {"system": self.system, "user": self.user}
        return [
            Message(role, _PLACEHOLDER.sub(lambda place: values[place[1]], text))
            for role, text in parts.items()
            if text
        ]


def load_prompt(source: str | Path) -> JudgePrompt:
    """Read a judge prompt.

    Args:
        source: one of `DEFAULT_PROMPTS`, or a file.

    Raises:
        ConfigError: the file cannot be read, a placeholder is missing or unknown, or the user says
            nothing; a line for each mistake.

    Example:
        >>> load_prompt("score").system
        'You are a helpful and precise assistant for checking the quality of the answer.'
    """
    supplied = Path(__file__).parent / "prompts" / f"{source}.txt"
    path = supplied if source in DEFAULT_PROMPTS else Path(source)
    try:
        # Editors may put a byte-order mark in front.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        names = " or ".join(DEFAULT_PROMPTS)
        raise ConfigError(f"{path}: no such judge prompt; give a file, or {names}") from None
    except OSError as failure:
        raise ConfigError(f"{path}: cannot be read: {failure.strerror}") from None
    except UnicodeDecodeError as invalid:
        raise ConfigError(f"{path}: byte {invalid.start} is not UTF-8; save the file as UTF-8") from None
    markers = [number for number, line in enumerate(lines) if line.strip() == _MARKER]
    mistakes = _mistakes(lines, markers)
    if mistakes:
        raise ConfigError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    split = markers[0] if markers else 0
    system, user = lines[:split], lines[split + 1 :] if markers else lines
    return JudgePrompt("\n".join(system).strip(), "\n".join(user).strip())


def _mistakes(lines: list[str], markers: list[int]) -> list[str]:
    wanted = ", ".join(f"{{{place}}}" for place in _PLACES)
    found = dict.fromkeys(_PLACEHOLDER.findall("\n".join(lines)))
    missing = [place for place in _PLACES if place not in found]
    mistakes = [f"{{{place}}} is missing; the judge must see {wanted}" for place in missing]
    mistakes += [
        f"{{{name}}} is not a placeholder ({wanted} are); write {{ {name} }} to say it as it is"
        for name in found
        if name not in _PLACES
    ]
    if len(markers) > 1:
        mistakes.append(f"line {markers[1] + 1}: a second {_MARKER}; only one line may divide the prompt")
    elif markers and not "".join(lines[markers[0] + 1 :]).strip():
        mistakes.append(f"line {markers[0] + 1}: nothing follows {_MARKER}; say there what to judge")
    return mistakes


def after_reasoning(text: str) -> str:
    r"""What a judge says once it has thought: all but a leading `<think>…</think>`.

    The opening tag may be missing, since some templates put it in the prompt. A pair of tags after
    other words is a quotation and stays. Where the end of the thinking is not to be seen (it was cut,
    or several closing tags could be the one), nothing is left.

    Example:
        >>> after_reasoning("<think>8 7? No.</think>\n8 9")
        '\n8 9'
    """
    thinking, closing, rest = text.partition("</think>")
    if not thinking.lstrip().startswith("<think>") and (not closing or "<think>" in thinking):
        return text
    return rest if closing and "</think>" not in rest else ""
