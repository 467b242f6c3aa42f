"""An answer of a chat API, or why there is none."""

from dataclasses import dataclass

from openai.types.chat import ChatCompletion

from gadfly.api.spending import NOTHING, Usage, is_count


@dataclass(frozen=True)
class ChatAnswer:
    """What the server answered, as it said it."""

    text: str
    finish_reason: str | None
    """None where the server did not say: it counts as finished."""
    refusal: str | None
    model: str
    """The model and version that answered, which need not be the name that was asked."""
    request_id: str | None
    usage: Usage | None
    attempts: int
    lost: Usage = NOTHING
    """At most so many tokens were paid for attempts before this one that broke off."""


class RequestFailed(Exception):
    """One question got no answer; others may.

    Attributes:
        kind: a fixed word: rate-limit, server-error, unreachable, timeout, cut-off, no-json,
            not-a-completion, no-choice, no-max-tokens or rejected (the server will never answer this one).
        detail: what the server said, without any key.
    """

    def __init__(self, kind: str, detail: str):
        """Keep both parts; the message joins them."""
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def answer_of(content: object, request_id: str | None, attempts: int) -> ChatAnswer:
    """The one answer of a completion, read without trust: a proxy may have sent anything.

    Raises:
        RequestFailed: it is no completion, or holds no answer.
    """
    if not isinstance(content, ChatCompletion):
        page = " ".join(str(content).split())
        what = "a web page instead of an answer" if page.startswith("<") else "what is no answer"
        detail = f"the server sent {what}; is base_url right, and no proxy between? It begins {page[:80]!r}"
        raise RequestFailed("not-a-completion", detail)
    choices = getattr(content, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        error = getattr(content, "error", None)
        raise RequestFailed("no-choice", f"the answer holds no choice{f', but {error}' if error else ''}")
    counted = [getattr(content.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if is_count(count) else None for count in counted)
    return ChatAnswer(
        text=_text(message, "content") or _parts(message),
        finish_reason=_text(choice, "finish_reason"),
        refusal=_text(message, "refusal") or None,
        model=_text(content, "model") or "",
        request_id=request_id or _text(content, "id"),
        usage=None if prompt is None or completion is None else Usage(prompt, completion),
        attempts=attempts,
    )


def _parts(message: object) -> str:
    """The text of an answer that comes in parts: some servers send thinking and text apart."""
    content = getattr(message, "content", None)
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    return "".join(_whole(text) for text in texts if isinstance(text, str))


def _text(holder: object, name: str) -> str | None:
    text = getattr(holder, name, None)
    return _whole(text) if isinstance(text, str) else None


def _whole(text: str) -> str:
    """A text that UTF-8 can hold: half a character, which an escape in JSON may give, is replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
