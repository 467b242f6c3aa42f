"""Text to tokens and back, in one place, for both roles, for training, scoring and evaluation.

    render(prompt, response, finished) = chat template with generation prompt
                                       + response tokens, no special token added
                                       + end-of-turn token, if and only if finished

Nothing here or elsewhere derives a mask from `!= pad` or `== end of turn`: lengths and `finished`
are data. A tokenizer without a chat template gets `PLAIN_TEMPLATE`. A template that asks for the date
is told `PROMPT_DATE`, whatever the day.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from transformers import GenerationConfig, PreTrainedTokenizerBase

from gadfly.control_tokens import ContentsAsText, make_controls_special
from gadfly.errors import UserError
from gadfly.records import Message

logger = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template of a tokenizer without one of its own; `{{ bos_token }}` precedes it where BOS is added."""

PROMPT_DATE = datetime(2024, 7, 26)
"""Today, for templates that write the date into the prompt (`strftime_now`, as in Llama 3 or gpt-oss).

A run that is resumed on another day renders the prompts it began with, and so does whoever scores or
generates later. It is the date that Llama 3's own template falls back on. The saved tokenizer keeps its
template as it was.
"""

# A definition of `strftime_now` to stand before a template and hide the one of transformers, which has no
# other handle: a function handed over as a variable reaches the template as text. Each directive of a format
# is replaced by its value; the newline keeps the template at the start of a line.
_DIRECTIVES = (*"aAbBcdDeFHIjmMpSTUwWxXyY", "-d", "-m")
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{name}', '{PROMPT_DATE.strftime(f'%{name}')}')" for name in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)

# Stands for an answer where a template is asked what it writes after one.
_ANSWER = "gadfly"

# What the tokenizer writes for bytes that are no UTF-8.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Renderer:
    """Renders conversations for one tokenizer.

    Attributes:
        tokenizer: with a chat template (its own or `PLAIN_TEMPLATE`).
        end_ids: every token that ends a turn, of the generation config and of the tokenizer.
        end_id: the one of them that is appended to a finished response.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    end_id: int

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat template with the generation prompt.

        A control string in a message stays text, unless the template makes something else of the message
        (see `control_tokens.py`).

        Raises:
            UserError: if the template refuses the conversation, as some do a system turn.
        """
        roles, contents = [message.role for message in messages], [message.content for message in messages]
        if not self._contents.are_plain(contents):
            as_text = self._contents.tokens(contents, lambda texts: self._prompt(roles, texts))
            if as_text is not None:
                return as_text
        # No special token is added: the template itself writes those it wants, BOS included.
        text = self._prompt(roles, contents)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def response_tokens(self, text: str, finished: bool) -> list[int]:
        """Ids of a response. A control string in the text, such as `<|im_end|>`, stays text."""
        return self.batch_response_tokens([text], [finished])[0]

    def batch_response_tokens(self, texts: Sequence[str], finished: Sequence[bool]) -> list[list[int]]:
        """The same for many responses, in one call of the tokenizer."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return [[*ids, self.end_id] if end else list(ids) for ids, end in zip(encoded, finished, strict=True)]

    def response_text(self, tokens: Sequence[int]) -> str:
        """Text of response ids, without the end-of-turn token they may close with.

        Any other control token shows as its string, so that a reader sees what was sampled.
        """
        content = list(tokens)
        if content and content[-1] in self.end_ids:
            content.pop()
        return str(
            self.tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _prompt(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        """The chat template with the generation prompt, as text."""
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, chat_template=self._dated_template(), tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as refusal:
            # A template is a program of the model's author and may raise anything.
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template refuses a prompt with the roles "
                f"{', '.join(roles)}: {refusal}"
            ) from refusal

    @cached_property
    def _contents(self) -> ContentsAsText:
        return ContentsAsText(self.tokenizer)

    def _dated_template(self) -> str:
        template = str(self.tokenizer.get_chat_template())
        return _FIXED_DATE + template if "strftime_now" in template else template


def has_invalid_utf8(text: str) -> bool:
    """Whether decoded text holds bytes that are no UTF-8 (the replacement character marks them)."""
    return _REPLACEMENT in text


def load_renderer(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> Renderer:
    """A renderer for a tokenizer and the generation config of its model.

    A tokenizer without a chat template is given the plain one, and is saved with it, so that a prompt has
    the same tokens wherever the saved folder is opened.

    Raises:
        UserError: if neither names an end-of-turn token.
    """
    end_ids = _end_ids(tokenizer, generation_config)
    if not end_ids:
        raise UserError(
            f"{tokenizer.name_or_path}: neither generation_config.json nor the tokenizer names an "
            f"end-of-turn token; set eos_token in tokenizer_config.json"
        )
    if not tokenizer.chat_template:
        logger.warning("%s has no chat template; the plain one is used", tokenizer.name_or_path)
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    make_controls_special(tokenizer, end_ids)
    return Renderer(tokenizer, end_ids, _turn_end(tokenizer, end_ids))


def _end_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> frozenset[int]:
    ids: set[int] = set()
    for source in (getattr(generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if source is not None:
            ids.update([source] if isinstance(source, int) else source)
    return frozenset(ids)


def _turn_end(tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> int:
    """The first end id that the chat template writes after an answer, else the tokenizer's, else any."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:
        # Some templates allow user turns only; then the tokenizer's own end is the only hint.
        text = ""
    _, answer, rest = text.rpartition(_ANSWER)
    written = tokenizer(rest, add_special_tokens=False)["input_ids"] if answer else []
    for token in written:
        if token in end_ids:
            return int(token)
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id in end_ids else min(end_ids)
