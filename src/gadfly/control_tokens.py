"""Which added tokens of a tokenizer control a model and which are text, and prompts whose contents are text.

A tokenizer holds added tokens for units, whatever the words around them. Those it calls special are controls;
the others may be as well, since authors are not strict about it: DeepSeek's role marks and Qwen's
`<|fim_prefix|>` are not special, and an answer that spells one would have it. So of the others, controls are

- those that end a turn;
- those that the template writes when turns hold nothing but their content; of those without punctuation only
  what it writes between turns, since words may be from a system prompt of its own;
- those in brackets or bars, as `<|fim_prefix|>` or `[REF]`, whether the template writes them or not; but not
  tags, as `<table>` or `<tool_call>`, nor what the template writes of an assistant's tool calls alone.

White space, single characters and thinking tags are text wherever the template writes them.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

# What turns hold where a template is asked what it writes around them.
_CONTENT = "gadfly"
_CONVERSATIONS = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("developer", "user"),
    ("user", "assistant", "tool"),
    ("user", "assistant", "function"),
)
# Some templates add arguments to text, others write them as JSON.
_ARGUMENTS: tuple[Any, ...] = ({}, "{}")

_THOUGHT = re.compile(r"\W*(think|thinking|thought|reasoning|reflection)\W*", re.IGNORECASE)
_MARK = re.compile(r"[<\[{|\uff5c\u25c1].*\w.*[>\]}|\uff5c\u25b7]")
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9_-]*/?>")


def make_controls_special(tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> None:
    """Let a tokenizer know its controls as special tokens, which it splits where it is told to.

    They stay so where it is saved.
    """
    texts = [_written(tokenizer, [_turn(role) for role in roles]) for roles in _CONVERSATIONS]
    written, between = "\n".join(texts), "\n".join(text.partition(_CONTENT)[2] for text in texts)
    called = "\n".join(_written(tokenizer, _tool_call(arguments)) for arguments in _ARGUMENTS)
    found = [
        AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=True,
        )
        for number, token in tokenizer.added_tokens_decoder.items()
        if not token.special and (number in end_ids or _is_control(token.content, written, between, called))
    ]
    if found:
        tokenizer.add_special_tokens({"additional_special_tokens": found}, replace_extra_special_tokens=False)


def _is_control(token: str, written: str, between: str, called: str) -> bool:
    """Whether an added token is one.

    Args:
        token: as text.
        written: what the template writes of turns.
        between: the same, after the content of the first.
        called: what it writes of tool calls.
    """
    name = token.strip()
    if len(name) < 2 or _THOUGHT.fullmatch(name):
        return False
    if not any(unicodedata.category(letter)[0] in "PS" for letter in name):
        return token in between
    is_text = _MARK.fullmatch(name) is None or _TAG.fullmatch(name) is not None or token in called
    return token in written or not is_text


def _turn(role: str) -> dict[str, Any]:
    return {"role": role, "content": _CONTENT}


def _tool_call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": _CONTENT, "arguments": arguments}
    call = {"id": "gadfly000", "type": "function", "function": function}
    return [_turn("user"), {"role": "assistant", "content": "", "tool_calls": [call]}]


def _written(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]]) -> str:
    """What the template writes of a conversation; nothing if it refuses."""
    opens = turns[-1]["role"] != "assistant"
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opens))
    except Exception:
        # A template is a program of the model's author and may raise anything.
        return ""


@dataclass(frozen=True)
class ContentsAsText:
    """Tokens of prompts in which a control string in a content stays text.

    Such a string goes through the template between two characters that nobody uses. What comes out is cut at
    the controls that the template wrote itself, where the tokenizer would cut it, and the parts are tokenised
    without controls.
    """

    tokenizer: PreTrainedTokenizerBase

    def are_plain(self, contents: Sequence[str]) -> bool:
        """Whether no content has a control string, and the tokenizer can be given the prompt as it is."""
        return not any(self._spelt.search(content) for content in contents)

    def tokens(self, contents: Sequence[str], render: Callable[[Sequence[str]], str]) -> list[int] | None:
        """Ids of the prompt with these contents.

        Returns:
            None where that is not sure: the template makes something else of marked contents, or without
            control strings the ids would not be those of the whole prompt.
        """
        unused = [mark for mark in map(chr, range(0xE000, 0xE100)) if mark not in "".join(contents)]
        if len(unused) < 2:
            return None
        opens, closes = unused[:2]
        marked = render([self._spelt.sub(lambda found: f"{opens}{found[0]}{closes}", c) for c in contents])
        if marked.replace(opens, "").replace(closes, "") != render(contents):
            return None
        harmless = render([self._spelt.sub("x", content) for content in contents])
        expected = self._encode(harmless, splits=False)
        for encode in (self._start, self._continuation):
            if self._put_together(harmless, opens, closes, encode) == expected:
                return self._put_together(marked, opens, closes, encode)
        return None

    def _put_together(
        self, text: str, opens: str, closes: str, encode: Callable[[str], list[int]]
    ) -> list[int] | None:
        """Ids of a prompt; None if text alone gives a control, as in a vocabulary of whole words."""
        ids: list[int] = []
        part, end = "", 0
        for found in re.finditer(f"{opens}(.*?){closes}|{self._written.pattern}", text, re.DOTALL):
            part += text[end : found.start()]
            end = found.end()
            if found[1] is not None:
                part += found[1]
                continue
            own = (encode if ids else self._start)(part)
            if not self._ids.isdisjoint(own):
                return None
            ids += own + self._encode(found[0], splits=False)
            part = ""
        own = (encode if ids else self._start)(part + text[end:])
        return ids + own if self._ids.isdisjoint(own) else None

    def _start(self, text: str) -> list[int]:
        return self._encode(text, splits=True)

    def _continuation(self, text: str) -> list[int]:
        """Ids as after something else: some tokenizers put a space before what they are given."""
        before, ids = self._start("\n"), self._start(f"\n{text}")
        return ids[len(before) :] if ids[: len(before)] == before else self._start(text)

    def _encode(self, text: str, *, splits: bool) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=splits, verbose=False)
        return list(encoded["input_ids"])

    @cached_property
    def _controls(self) -> dict[int, AddedToken]:
        """By id, the longest first."""
        tokens = self.tokenizer.added_tokens_decoder
        special = {number: token for number, token in tokens.items() if token.special and token.content}
        return dict(sorted(special.items(), key=lambda item: -len(item[1].content)))

    @cached_property
    def _ids(self) -> frozenset[int]:
        """Of the controls, but for what stands for whatever a vocabulary lacks."""
        return frozenset(self._controls) - {self.tokenizer.unk_token_id}

    @cached_property
    def _spelt(self) -> re.Pattern[str]:
        return _any_of(re.escape(token.content) for token in self._controls.values())

    @cached_property
    def _written(self) -> re.Pattern[str]:
        """Controls with the white space beside them that the tokenizer takes for a part of them."""
        return _any_of(
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
            for token in self._controls.values()
        )


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or "(?!)")
