"""The lines of a batch's files: how a question is put, and what an answer or an error means."""

import json
from dataclasses import dataclass
from typing import Any, Final

from openai.types.chat import ChatCompletion

from gadfly.api.chat_answer import ChatAnswer, RequestFailed, answer_of
from gadfly.api.chat_api import ChatApi
from gadfly.api.chat_request import ChatRequest
from gadfly.run_folder import Record

ENDPOINT: Final = "/v1/chat/completions"

# Turned down for what they say, not for who asks or when.
_PASSING = frozenset({401, 403, 404, 408, 409, 429})


@dataclass(frozen=True)
class BatchRows:
    """Writes and reads the lines of one API's batches."""

    api: ChatApi

    def line(self, request: ChatRequest) -> bytes:
        """A line of the file to upload; the answer's line will have the same `custom_id`."""
        fields = self.api.fields(request)
        more = fields.pop("extra_body") or {}
        row = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": fields | more}
        return json.dumps(row).encode() + b"\n"

    def answer(self, row: Record, attempts: int, cap_name: str) -> ChatAnswer:
        """The answer that a line of the output or the errors holds.

        Args:
            row: the line.
            attempts: how often the question was submitted.
            cap_name: what the batch called the cap of an answer.

        Raises:
            RequestFailed: it holds none; beside the usual kinds, `expired` and `cancelled` were not asked.
        """
        response = _table(row.get("response"))
        status, body = response.get("status_code"), response.get("body")
        if status != 200:
            error = _table(body).get("error") or row.get("error")
            problem = {"message": error} if isinstance(error, str) else _table(error)
            raise self._failure(status if isinstance(status, int) else None, problem, cap_name)
        content = ChatCompletion.construct(**body) if isinstance(body, dict) else body
        request_id = response.get("request_id")
        answer = answer_of(content, request_id if isinstance(request_id, str) else None, attempts)
        return self.api.without_key(answer)

    def _failure(self, status: int | None, error: dict[str, Any], cap_name: str) -> RequestFailed:
        message, code = (str(error.get(name) or "") for name in ("message", "code"))
        detail = self.api.safe_line(
            ": ".join(filter(None, (str(status or code), message))) or "no reason is given"
        )
        if status == 400 and "max_completion_tokens" in message and cap_name == "max_tokens":
            return RequestFailed("no-max-tokens", detail)
        if status == 429:
            return RequestFailed("rate-limit", detail)
        if status and 400 <= status < 500 and status not in _PASSING:
            return RequestFailed("rejected", detail)
        if code in ("batch_expired", "batch_cancelled"):
            return RequestFailed(code.removeprefix("batch_"), detail)
        return RequestFailed("server-error", detail)


def _table(value: object) -> dict[str, Any]:
    """A server may have put anything in its place."""
    return value if isinstance(value, dict) else {}
