"""How fast requests go out: as the recipe says, as the server says, and not at all while it asks to wait."""

import asyncio
import time
from email.utils import formatdate

import pytest

from gadfly.api.rate_limits import Places, RateLimits, retry_after_seconds, seconds_of


def seconds_for(limits: RateLimits, count: int, tokens: float = 1.0) -> float:
    """How long so many requests that come at once wait in all."""

    async def go() -> None:
        await asyncio.gather(*(limits.turn(tokens) for _ in range(count)))

    began = time.monotonic()
    asyncio.run(go())
    return time.monotonic() - began


def rate_headers(limit: object, left: object, reset: object, kind: str = "requests") -> dict[str, str]:
    parts = {"limit": limit, "remaining": left, "reset": reset}
    return {f"x-ratelimit-{part}-{kind}": str(value) for part, value in parts.items()}


def test_without_any_pace_nothing_waits() -> None:
    assert seconds_for(RateLimits(None, None), 1000) < 0.5


def test_requests_keep_to_the_pace_but_for_a_burst() -> None:
    # 20 a second, and 40 at once at first.
    assert 0.45 < seconds_for(RateLimits(1200.0, None), 50) < 1.5


def test_tokens_keep_to_the_pace_as_well() -> None:
    assert 0.45 < seconds_for(RateLimits(None, 120_000.0), 50, tokens=100.0) < 1.5


def test_a_request_larger_than_the_burst_waits_and_goes() -> None:
    assert 0.4 < seconds_for(RateLimits(None, 6000.0), 1, tokens=250.0) < 1.5


def test_a_pause_holds_everything_and_the_longest_counts() -> None:
    limits = RateLimits(None, None)
    limits.pause(0.4)
    limits.pause(0.1)
    assert limits.paused_seconds == pytest.approx(0.4, abs=0.1)
    assert 0.35 < seconds_for(limits, 20) < 1.0


def test_what_the_server_says_is_left_goes_at_once_and_the_rest_at_its_rate() -> None:
    limits = RateLimits(None, None)
    limits.heed(rate_headers(600, 5, "59.5s"), Places(0.0, 0.0))
    assert seconds_for(limits, 5) < 0.3
    assert 0.25 < seconds_for(limits, 3) < 1.0


def test_a_window_that_has_just_begun_does_not_hold_up_what_is_left_of_it() -> None:
    limits = RateLimits(None, None)
    # One of sixty is used, and the next minute begins in 59 s.
    limits.heed(rate_headers(60, 59, 59), Places(1.0, 1.0))
    assert seconds_for(limits, 59) < 0.5


def test_a_newer_answer_opens_the_queue_for_those_who_wait() -> None:
    limits = RateLimits(None, None)
    limits.heed(rate_headers(60, 0, 60), Places(0.0, 0.0))

    async def go() -> float:
        began = time.monotonic()
        waiting = [asyncio.create_task(limits.turn(1.0)) for _ in range(30)]
        await asyncio.sleep(0.1)
        limits.heed(rate_headers(60, 50, 10), Places(0.0, 0.0))
        await asyncio.gather(*waiting)
        return time.monotonic() - began

    assert asyncio.run(go()) < 2.0


@pytest.mark.parametrize(
    "headers",
    [
        rate_headers("many", "some", "soon"),
        rate_headers(60, 60, 0),
        rate_headers(60, 0, 1_900_000_000),
        rate_headers(60, -3, 60),
        rate_headers(60, 0, "nan"),
        {"x-ratelimit-limit-requests": "60"},
    ],
)
def test_headers_that_say_nothing_hold_nothing_up(headers: dict[str, str]) -> None:
    limits = RateLimits(None, None)
    limits.heed(headers, Places(0.0, 0.0))
    assert seconds_for(limits, 100) < 0.3


def test_tokens_of_the_server_are_kept_to() -> None:
    limits = RateLimits(None, None)
    limits.heed(rate_headers(60_000, 100, "59.9s", "tokens"), Places(0.0, 0.0))
    assert 0.3 < seconds_for(limits, 5, tokens=100.0) < 1.5


def test_a_time_to_wait_is_read_however_it_is_written() -> None:
    assert retry_after_seconds({"retry-after": "2"}) == 2
    assert retry_after_seconds({"retry-after": "2.5"}) == 2.5
    assert retry_after_seconds({"retry-after": "2", "retry-after-ms": "150"}) == 0.15
    date = formatdate(time.time() + 30, usegmt=True)
    assert retry_after_seconds({"retry-after": date}) == pytest.approx(29.5, abs=1.5)
    past = formatdate(time.time() - 30, usegmt=True)
    assert retry_after_seconds({"retry-after": past}) == 0
    assert [retry_after_seconds({"retry-after": odd}) for odd in ("later", "-3", "inf", "")] == [None] * 4
    assert retry_after_seconds({}) is None


def test_a_duration_is_read_only_where_it_is_one() -> None:
    assert seconds_of("6m0s") == 360
    assert [seconds_of(odd) for odd in ("6x", "s", "-1", "inf", "nan")] == [None] * 5
