"""How fast an API may be asked: a pace of requests and tokens, given by the recipe or told by the server.

A request has a place in each of two queues, of requests and of tokens: how many were let out before it,
itself included. It goes once both queues are open up to its place.
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import NamedTuple

# A pace of a minute may come in bursts of this share of it.
_BURST_MINUTES = 1 / 30
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# What a server says may change while a request waits for its place.
_LOOK_AGAIN_SECONDS = 1.0
# A longer time to a reset is no duration, but a date.
_LONGEST_RESET_SECONDS = 86400.0


class Places(NamedTuple):
    """Where a request stands in both queues."""

    requests: float
    tokens: float


class _Pace:
    """The recipe's pace: a queue that opens at a steady rate, a small burst ahead at most."""

    def __init__(self, per_minute: float):
        self._rate = per_minute / 60
        self._burst = max(1.0, per_minute * _BURST_MINUTES)
        self._open = self._burst
        self._looked_at = time.monotonic()

    def wait_seconds(self, place: float, last: float) -> float:
        """Until the queue is open up to a place; `last` is the last place taken by any request."""
        now = time.monotonic()
        self._open = min(last + self._burst, self._open + (now - self._looked_at) * self._rate)
        self._looked_at = now
        return (place - self._open) / self._rate


class _Allowance:
    """The server's pace: with each answer it says how far behind that request the queue is open."""

    def __init__(self) -> None:
        self._open, self._rate, self._learned_at = math.inf, 0.0, 0.0

    def learn(self, place: float, limit: float, left: float, reset_seconds: float) -> None:
        """Adopt what an answer to the request at `place` says.

        What is used comes back within the time to the reset: that is the rate of a server that refills all
        the time, but no more than the limit a minute. A server that refills at the reset alone lets out less,
        and refuses what is too early.
        """
        self._open, self._rate = place + left, min((limit - left) / reset_seconds, limit / 60)
        self._learned_at = time.monotonic()

    def wait_seconds(self, place: float) -> float:
        if place <= self._open:
            return 0.0
        return (place - self._open) / self._rate - (time.monotonic() - self._learned_at)


class RateLimits:
    """When the next request may go out. One for all requests to an API.

    Example:
        >>> limits = RateLimits(requests_per_minute=None, tokens_per_minute=None)
        >>> asyncio.run(limits.turn(tokens=100.0))
        Places(requests=1.0, tokens=100.0)
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None):
        """Either pace may be None: then only what the server says holds."""
        self._last = Places(0.0, 0.0)
        paces = (requests_per_minute, tokens_per_minute)
        self._paces = [_Pace(per_minute) if per_minute else None for per_minute in paces]
        self._allowances = (_Allowance(), _Allowance())
        self._closed_until = 0.0

    async def turn(self, tokens: float, rest: Callable[[float], Awaitable[object]] = asyncio.sleep) -> Places:
        """Wait until a request of so many tokens may go out.

        Args:
            tokens: of question and answer, estimated.
            rest: waits for so many seconds.
        """
        self._last = places = Places(self._last.requests + 1.0, self._last.tokens + tokens)
        while (seconds := max(self.paused_seconds, self._queue_seconds(places))) > 0:
            await rest(min(seconds, _LOOK_AGAIN_SECONDS))
        return places

    def _queue_seconds(self, places: Places) -> float:
        waits = [
            allowance.wait_seconds(place) for allowance, place in zip(self._allowances, places, strict=True)
        ]
        for pace, place, last in zip(self._paces, places, self._last, strict=True):
            if pace is not None:
                waits.append(pace.wait_seconds(place, last))
        return max(waits)

    @property
    def paused_seconds(self) -> float:
        """How long nothing goes out for."""
        return max(0.0, self._closed_until - time.monotonic())

    def pause(self, seconds: float) -> None:
        """Let nothing out for a while: the server asked for it."""
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    def heed(self, headers: Mapping[str, str], places: Places) -> None:
        """Adopt the pace that the `x-ratelimit-*` headers of the answer to a request tell."""
        for kind, allowance, place in zip(("requests", "tokens"), self._allowances, places, strict=True):
            if (header := headers.get(f"x-ratelimit-limit-{kind}")) is None:
                continue
            limit, left = _amount(header), _amount(headers.get(f"x-ratelimit-remaining-{kind}"))
            reset = seconds_of(headers.get(f"x-ratelimit-reset-{kind}"))
            if limit is None or left is None or not reset or reset > _LONGEST_RESET_SECONDS:
                continue
            if limit > left >= 0:
                allowance.learn(place, limit, left, reset)


def _amount(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def seconds_of(text: str | None) -> float | None:
    """Seconds of a duration as servers write it; None if it is none.

    Example:
        >>> [seconds_of(text) for text in ("2", "20ms", "6m0s", "1h2m3.5s", "soon", None)]
        [2.0, 0.02, 360.0, 3723.5, None, None]
    """
    if not text:
        return None
    if (plain := _amount(text)) is not None:
        return plain if math.isfinite(plain) and plain >= 0 else None
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|[smhd]))+", text):
        return None
    return sum(
        float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|[smhd])", text)
    )


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """How long the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    milliseconds = seconds_of(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if (seconds := seconds_of(text)) is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(text or "").timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
