"""One question to an OpenAI-compatible API: sent again while that can help, its answer checked before use.

The `openai` client speaks; what to do when the server does not answer as it should is decided here, since all
requests in flight share one pace and one budget.
"""

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai

from gadfly.api.api_key import ApiKey
from gadfly.api.chat_answer import ChatAnswer, RequestFailed, answer_of
from gadfly.api.chat_request import ChatRequest, parameters_of
from gadfly.api.rate_limits import Places, RateLimits, retry_after_seconds
from gadfly.api.spending import NOTHING, Spending
from gadfly.config import ApiConfig
from gadfly.errors import ApiError, ConfigError
from gadfly.records import Message

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 60.0
# A server that never answered is given up so soon, and a connection is made within so long.
_NEVER_REACHED_SECONDS, _CONNECT_SECONDS = 10.0, 10.0

# The client's errors after which the server cannot have seen the request.
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError"})
# After these it may have answered and been paid for it.
_MAY_BE_PAID = frozenset({"timeout", "cut-off", "no-json", "not-a-completion", "no-choice"})
# Words of refusals that are for one question, or for all, whatever their status says.
_FLAGGED = re.compile("flagged|moderation|content.policy", re.IGNORECASE)
_ABOUT_KEY = re.compile("api.?key", re.IGNORECASE)
_ABOUT_CREDIT = re.compile("credit balance|insufficient.(credit|balance|fund|quota)|billing", re.IGNORECASE)


class NotAsked(Exception):
    """The asking was stopped before this question was sent."""


class ChatApi:
    """An API to ask, with one pace, one budget and one count of errors for all requests in flight."""

    def __init__(self, config: ApiConfig, section: str, spending: Spending | None = None):
        """Open the API of a section of the recipe.

        Raises:
            ConfigError: no model is named, or the variable that should hold the key is not set.
        """
        if config.model is None:
            raise ConfigError(f"{section}.model: must be given: the model's name at {config.base_url}")
        self.config, self.section, self.model = config, section, config.model
        self.spending = spending or Spending(config)
        self.errors: Counter[str] = Counter()
        self.limits = RateLimits(config.requests_per_minute, config.tokens_per_minute)
        self.heard_at = time.monotonic()
        """When it last answered, by the clock that only goes forward."""
        self.cap_name = "max_tokens"
        """What this server calls the cap of an answer."""
        self._key = ApiKey.of(config, section)
        self._stopped = asyncio.Event()
        self._opened_at = self._refused_since = self.heard_at
        self._num_refused, self._is_reached = 0, False
        seconds = config.timeout_seconds
        self.client = openai.AsyncOpenAI(
            api_key=self._key.value or "none",
            base_url=config.base_url,
            timeout=openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
            max_retries=0,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    def stop(self) -> None:
        """Let what is in flight come to its end, and send nothing again."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether nothing is sent any more."""
        return self._stopped.is_set()

    def request(self, messages: tuple[Message, ...], sample_index: int = 0, **parameters: Any) -> ChatRequest:
        """A question with the section's parameters, those given here taking their place."""
        return ChatRequest(self.model, messages, {**parameters_of(self.config), **parameters}, sample_index)

    async def answer(self, request: ChatRequest) -> ChatAnswer:
        """Ask until there is an answer.

        Raises:
            RequestFailed: this question cannot be answered, or not now.
            ApiError: no question can: wrong key, unknown model, no credit, no such server.
            BudgetSpent: asking once more might cross the budget.
            NotAsked: `stop` came first.
        """
        attempts = failures = 0
        lost = NOTHING
        while True:
            attempts += 1
            try:
                answer = await self._attempt(request, attempts)
                return replace(answer, lost=lost) if lost.total else answer
            except RequestFailed as failure:
                self.errors[failure.kind] += 1
                if failure.kind in _MAY_BE_PAID:
                    lost += request.token_bound
                if failure.kind == "rejected" or self.is_stopped:
                    raise
                if failure.kind not in ("rate-limit", "no-max-tokens"):
                    failures += 1
                    await self._back_off(failure, failures)

    async def _back_off(self, failure: RequestFailed, failures: int) -> None:
        """Wait before the next attempt, or give up."""
        unreached_seconds = 0.0 if self._is_reached else time.monotonic() - self._opened_at
        if failure.kind == "unreachable" and unreached_seconds >= _NEVER_REACHED_SECONDS:
            raise self.fatal(f"cannot be reached: {failure.detail}; is base_url right?")
        if failures < self.config.max_attempts:
            await self._rest(wait_seconds(failures))
        if self.is_stopped or failures >= self.config.max_attempts:
            raise failure

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    async def _attempt(self, request: ChatRequest, attempts: int) -> ChatAnswer:
        places = await self.limits.turn(request.likely_tokens, self._rest_unless_stopped)
        await self.spending.reserve(bound := request.token_bound)
        if self.is_stopped:
            self.spending.withdraw(bound)
            raise NotAsked
        used = None
        try:
            answer = await self._send(request, attempts, places)
            used = answer.usage or bound
            return answer
        except RequestFailed as failure:
            used = bound if failure.kind in _MAY_BE_PAID else None
            raise
        finally:
            self.spending.release(bound, used)

    async def _rest_unless_stopped(self, seconds: float) -> None:
        await self._rest(seconds)
        if self.is_stopped:
            raise NotAsked

    async def _send(self, request: ChatRequest, attempts: int, places: Places) -> ChatAnswer:
        cap_name = self.cap_name
        try:
            with self.explain_failures(f"no model {request.model!r} there, or not the address of an API"):
                raw = await self._raw(request, places)
                content: object = raw.parse()
            self._is_reached = True
            answer = self.without_key(answer_of(content, raw.request_id, attempts))
        except RequestFailed as failure:
            is_final = failure.kind == "no-max-tokens" and cap_name != "max_tokens"
            kind = "rejected" if is_final else failure.kind
            raise RequestFailed(kind, self.safe_line(failure.detail)) from None
        self.heard_at = time.monotonic()
        return answer

    async def _raw(self, request: ChatRequest, places: Places) -> Any:
        """The client's time-out is for each piece that arrives, this one for the whole answer."""
        seconds = self.config.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                create = self.client.chat.completions.with_raw_response.create
                raw = await create(**self.fields(request))
        except TimeoutError:
            raise RequestFailed("timeout", f"no whole answer in {seconds:g} s") from None
        except openai.APIStatusError as failure:
            self.limits.heed(failure.response.headers, places)
            raise
        self.limits.heed(raw.headers, places)
        return raw

    @contextlib.contextmanager
    def explain_failures(self, not_found: str) -> Iterator[None]:
        """Say what a failure of the client inside means; `not_found` is what a 404 says.

        Raises:
            RequestFailed: asked again, it may be answered, unless it is `rejected`.
            ApiError: nothing will be answered.
        """
        try:
            yield
        except openai.APIStatusError as failure:
            self._is_reached = True
            raise self._refusal(failure, not_found) from None
        except openai.APIConnectionError as failure:
            cause = failure.__cause__ or failure
            name = type(cause).__name__
            detail = self.safe_line(f"{name}: {cause}").rstrip(": ")
            if name in _NOT_SENT:
                raise RequestFailed("unreachable", detail) from None
            kind = "timeout" if isinstance(failure, openai.APITimeoutError) else "cut-off"
            raise RequestFailed(kind, detail) from None
        except (ValueError, RecursionError, openai.APIError) as failure:
            raise RequestFailed("no-json", self.safe_line(str(failure))) from None

    def fields(self, request: ChatRequest) -> dict[str, Any]:
        """The request as the client takes it."""
        fields = dict(request.parameters)
        cap = fields.pop("max_tokens", None)
        return {
            "model": request.model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
            **({} if cap is None else {self.cap_name: cap}),
            **{name: fields.pop(name) for name in ("temperature", "top_p") if name in fields},
            "extra_body": fields or None,
        }

    def _refusal(self, failure: openai.APIStatusError, not_found: str) -> Exception:
        """What an answer with an error status means: for this question, or for all."""
        status = failure.status_code
        message = failure.message.removeprefix(f"Error code: {status} - ")
        detail = f"{status}: {self.safe_line(message)}"
        is_unpaid = status == 429 and "insufficient_quota" in (failure.code, failure.type)
        if status == 402 or is_unpaid or (status in (400, 403) and _ABOUT_CREDIT.search(message)):
            return self.fatal(f"no credit left: {detail}")
        if status == 429:
            return self._slow_down(failure, detail)
        if status == 400 and "max_completion_tokens" in message:
            self.cap_name = "max_completion_tokens"
            return RequestFailed("no-max-tokens", detail)
        if status == 403 and _FLAGGED.search(message):
            return RequestFailed("rejected", detail)
        if status in (401, 403) or (status == 400 and _ABOUT_KEY.search(message)):
            variable = self.config.api_key_env
            hint = (
                f"the key in {variable} is wrong or expired"
                if variable
                else "it wants a key; set api_key_env"
            )
            page = ", unless it is a proxy that answers with this page" if message.lstrip()[:1] == "<" else ""
            return self.fatal(f"{hint}{page}: {detail}")
        if status in (404, 405):
            return self.fatal(f"{not_found}: {detail}")
        if status in (408, 409) or status >= 500:
            if wait := retry_after_seconds(failure.response.headers):
                self.limits.pause(min(wait, _LONGEST_WAIT_SECONDS))
            return RequestFailed("server-error", detail)
        return RequestFailed("rejected", detail)

    def _slow_down(self, failure: openai.APIStatusError, detail: str) -> Exception:
        now, give_up_seconds = time.monotonic(), self.config.give_up_seconds
        if self._refused_since <= self.heard_at:
            self._refused_since, self._num_refused = now, 0
        refused_for, asked = now - self._refused_since, retry_after_seconds(failure.response.headers)
        if max(asked or 0.0, refused_for) > give_up_seconds:
            asks = asked is not None and asked > give_up_seconds
            refused = f"has refused everything for {refused_for:.0f} s"
            wait = f"asks to wait {asked:.0f} s" if asks else refused
            return self.fatal(f"{wait}, more than give_up_seconds = {give_up_seconds:g}: {detail}")
        # All that are in flight are refused together: that is one refusal.
        self._num_refused += not self.limits.paused_seconds
        self.limits.pause(asked or wait_seconds(max(1, self._num_refused)))
        return RequestFailed("rate-limit", detail)

    def fatal(self, why: str) -> ApiError:
        """The error that ends all asking: says which API, and why."""
        return ApiError(f"{self.section} {self.model!r} at {self.config.base_url}: {why}")

    def without_key(self, answer: ChatAnswer) -> ChatAnswer:
        """An answer as it may be kept, where a server repeats the key in it."""
        names = ("text", "finish_reason", "refusal", "model", "request_id")
        fields = ((name, getattr(answer, name)) for name in names)
        kept: dict[str, Any] = {name: self._key.removed_from(text) for name, text in fields if text}
        return replace(answer, **kept)

    def safe_line(self, text: str) -> str:
        """What a server said, in one line of at most 200 characters, without any key."""
        return self._key.hidden_in(text)


def wait_seconds(failures: int) -> float:
    """Twice as long after each failure, and never the same for two requests."""
    doubled = _FIRST_WAIT_SECONDS * 2.0 ** min(failures - 1, 10)
    return min(_LONGEST_WAIT_SECONDS, doubled) * random.uniform(0.5, 1.0)
