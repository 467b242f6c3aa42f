"""A question to a chat API, and the key its answer is kept under."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gadfly.api.spending import Usage
from gadfly.config import ApiConfig
from gadfly.records import Message
from gadfly.run_folder import Record

# What a chat template adds to a turn, and to the whole (a system prompt of its own), at most; and what an
# answer without a cap is taken to hold for the pace.
_TURN_TOKENS, _TEMPLATE_TOKENS, _USUAL_RESPONSE_TOKENS = 16, 64, 512


@dataclass(frozen=True)
class ChatRequest:
    """One question: who is asked, what, with which parameters, and which sample of it this is.

    Example:
        >>> ask = ChatRequest("gpt-4o", (Message("user", "2+2?"),), {"temperature": 1.0})
        >>> ask.key == ChatRequest("gpt-4o", ask.messages, ask.parameters, sample_index=1).key
        False
    """

    model: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sample_index: int = 0

    @cached_property
    def key(self) -> str:
        """SHA-256 over all of it: what is on disk under this key is the answer to this question."""
        turns = [[message.role, message.content] for message in self.messages]
        content = [self.model, turns, dict(self.parameters), self.sample_index]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def token_bound(self) -> Usage:
        """At most so many tokens: no tokenizer makes more of a text than its bytes."""
        prompt = sum(len(message.content.encode()) + _TURN_TOKENS for message in self.messages)
        return Usage(prompt + _TEMPLATE_TOKENS, int(self.parameters.get("max_tokens", 0)))

    @property
    def likely_tokens(self) -> float:
        """About so many tokens, at four bytes each: what the pace is kept by."""
        return self.token_bound.prompt_tokens / 4 + (
            self.token_bound.completion_tokens or _USUAL_RESPONSE_TOKENS
        )


@dataclass(frozen=True)
class Question:
    """A request, and what its row tells beside the answer."""

    request: ChatRequest
    about: Record = field(default_factory=dict)


def parameters_of(config: ApiConfig) -> dict[str, Any]:
    """The parameters of a request that the recipe sets; what it leaves out is the server's choice."""
    named = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": config.max_response_tokens,
    }
    return {**{name: value for name, value in named.items() if value is not None}, **config.extra_body}
