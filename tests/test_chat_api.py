"""What each kind of failure means: for one attempt, for one question, or for all."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fault_server import Fault, FaultServer, Ledger

from gadfly.api.api_key import ApiKey
from gadfly.api.chat_answer import ChatAnswer, RequestFailed, answer_of
from gadfly.api.chat_api import ChatApi, NotAsked
from gadfly.api.chat_request import ChatRequest
from gadfly.api.spending import NOTHING
from gadfly.config import ApiConfig
from gadfly.errors import ApiError, ConfigError
from gadfly.records import Message

KEY = "zq-0123456789-SECRET-abcdef"
QUESTION = (Message("user", "2+2?"),)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


def config(base_url: str, **settings: Any) -> ApiConfig:
    return ApiConfig(base_url=base_url, model="m", api_key_env="TEACHER_KEY", **settings)


def ask(base_url: str, **settings: Any) -> tuple[ChatAnswer, ChatApi]:
    """The answer to one question, and the API that was asked."""

    async def go() -> tuple[ChatAnswer, ChatApi]:
        api = ChatApi(config(base_url, **settings), "teacher")
        try:
            return await api.answer(api.request(QUESTION)), api
        finally:
            await api.close()

    return asyncio.run(go())


def asked(faults: list[Fault | None], **settings: Any) -> tuple[ChatAnswer, ChatApi, Ledger]:
    with FaultServer(faults=faults) as server:
        return *ask(server.base_url, **settings), server.ledger


# ------------------------------------------------------------------------------------- one attempt


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("server_error"), "server-error"),
        (Fault("server_error", status=503), "server-error"),
        (Fault("server_error", status=408), "server-error"),
        (Fault("server_error", status=409), "server-error"),
        (Fault("cut"), "cut-off"),
        (Fault("reset"), "cut-off"),
        (Fault("malformed"), "no-json"),
        (Fault("html"), "not-a-completion"),
        (Fault("empty_choices"), "no-choice"),
        (Fault("rate_limit", seconds=0.2), "rate-limit"),
        (Fault("rate_limit"), "rate-limit"),
    ],
)
def test_what_may_pass_is_asked_again(fault: Fault, kind: str) -> None:
    answer, api, ledger = asked([fault])
    assert answer.text == "answer to 2+2?"
    assert answer.attempts == 2
    assert api.errors == {kind: 1}
    assert ledger.seen.total() == api.spending.requests == 2


def test_a_server_that_is_too_slow_is_asked_again() -> None:
    answer, api, _ = asked([Fault("slow", seconds=5)], timeout_seconds=2.0)
    assert answer.text == "answer to 2+2?"
    assert api.errors == {"timeout": 1}


def test_an_answer_that_trickles_in_is_given_up_in_time() -> None:
    async def trickle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        try:
            for _ in range(100):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def go() -> None:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        settings = {"timeout_seconds": 0.5, "max_attempts": 1}
        api = ChatApi(config(f"http://127.0.0.1:{port}/v1", **settings), "teacher")
        with pytest.raises(RequestFailed, match=r"timeout: no whole answer in 0\.5 s"):
            await asyncio.wait_for(api.answer(api.request(QUESTION)), 5)
        await api.close()
        server.close()

    asyncio.run(go())


def test_a_time_to_wait_is_waited_and_is_no_attempt() -> None:
    faults: list[Fault | None] = [Fault("rate_limit", seconds=0.1)] * 5
    answer, api, _ = asked(faults, max_attempts=1)
    assert answer.attempts == 6
    assert api.errors == {"rate-limit": 5}


def test_a_date_to_wait_for_is_waited_for() -> None:
    answer, _, _ = asked([Fault("rate_limit", seconds=0.5, as_date=True)], max_attempts=1)
    assert answer.attempts == 2


def test_attempts_have_an_end() -> None:
    with FaultServer(faults=lambda number, body: Fault("server_error")) as server:
        with pytest.raises(RequestFailed, match="server-error: 500: The server had an error"):
            ask(server.base_url, max_attempts=2)
        assert server.ledger.seen.total() == 2


@pytest.mark.parametrize("fault", ["cut", "reset", "malformed", "html", "empty_choices"])
def test_an_attempt_that_may_have_been_paid_counts_at_its_bound(fault: Any) -> None:
    answer, api, _ = asked([Fault(fault)], max_response_tokens=50)
    bound = api.request(QUESTION).token_bound
    assert bound.completion_tokens == 50
    assert answer.lost == bound
    assert answer.usage is not None
    assert api.spending.used == answer.usage + bound


@pytest.mark.parametrize("fault", [Fault("server_error"), Fault("rate_limit", seconds=0.1)])
def test_an_attempt_that_was_refused_costs_nothing(fault: Fault) -> None:
    answer, api, _ = asked([fault], max_response_tokens=50)
    assert answer.lost == NOTHING
    assert api.spending.used == answer.usage


# ------------------------------------------------------------------------------------ one question


@pytest.mark.parametrize(
    "fault", [Fault("bad_request"), Fault("context_length"), Fault("server_error", status=413)]
)
def test_a_question_that_is_turned_down_is_not_asked_again(fault: Fault) -> None:
    with FaultServer(faults=[fault]) as server:
        with pytest.raises(RequestFailed) as failed:
            ask(server.base_url)
        assert failed.value.kind == "rejected"
        assert server.ledger.seen.total() == 1


def test_the_name_of_the_cap_follows_the_server_and_costs_no_attempt() -> None:
    fault = Fault("wants_max_completion_tokens")
    with FaultServer(faults=lambda number, body: fault) as server:
        answer, _ = ask(server.base_url, max_response_tokens=9, max_attempts=1)
        assert answer.attempts == 2
        bodies = list(server.ledger.seen)
    assert ['"max_completion_tokens":9' in body for body in bodies] == [False, True]


# --------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("expired_key"), "the key in TEACHER_KEY is wrong or expired: 401: "),
        (Fault("server_error", status=403), "the key in TEACHER_KEY is wrong or expired: 403: "),
        (Fault("unknown_model"), "no model 'm' there, or not the address of an API: 404: "),
        (Fault("server_error", status=405), "not the address of an API: 405: "),
        (Fault("insufficient_quota"), "no credit left: 429: "),
        (Fault("server_error", status=402), "no credit left: 402: "),
        (Fault("rate_limit", seconds=400), "asks to wait 400 s, more than give_up_seconds = 300: 429: "),
    ],
)
def test_what_cannot_pass_ends_all_asking_at_once(fault: Fault, expected: str) -> None:
    with FaultServer(faults=[fault]) as server:
        with pytest.raises(ApiError) as failed:
            ask(server.base_url)
        assert server.ledger.seen.total() == 1
    message = str(failed.value)
    assert message.startswith(f"teacher 'm' at {server.base_url}: ")
    assert expected in message
    assert "\n" not in message


def test_a_server_that_refuses_everything_for_too_long_is_given_up() -> None:
    message = r"has refused everything for \d+ s, more than give_up_seconds = 1"
    with (
        FaultServer(faults=lambda number, body: Fault("rate_limit", seconds=0.3)) as server,
        pytest.raises(ApiError, match=message),
    ):
        ask(server.base_url, give_up_seconds=1.0)


def test_a_server_that_never_answered_is_given_up_soon() -> None:
    with pytest.raises(RequestFailed, match="unreachable: ConnectError"):
        ask("http://127.0.0.1:9/v1", max_attempts=2)


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_told_within_20_seconds_by_default() -> None:
    began = time.monotonic()
    with pytest.raises((ApiError, RequestFailed), match="ConnectError"):
        ask("http://127.0.0.1:9/v1")
    assert time.monotonic() - began < 20


# --------------------------------------------------------------------------------------------- stop


def test_a_stop_ends_waiting_at_once_and_sends_nothing_more() -> None:
    with FaultServer(faults=[Fault("rate_limit", seconds=30)]) as server:

        async def go() -> None:
            api = ChatApi(config(server.base_url), "teacher")
            waiting = asyncio.create_task(api.answer(api.request(QUESTION)))
            while not api.errors:
                await asyncio.sleep(0.01)
            api.stop()
            with pytest.raises(NotAsked):
                await asyncio.wait_for(waiting, 2)
            assert api.spending.requests == 1
            await api.close()

        asyncio.run(go())
        assert server.ledger.seen.total() == 1


# ---------------------------------------------------------------------------------------------- key


def test_a_missing_key_is_told_by_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env: the environment variable TEACHER_KEY"):
        ChatApi(config("http://localhost/v1"), "teacher")


@pytest.mark.parametrize("value", ["two words", "sk-1…2", "a\nb"])
def test_what_can_be_no_key_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(ConfigError) as refused:
        ChatApi(config("http://localhost/v1"), "teacher")
    assert value not in str(refused.value)


def test_without_a_variable_no_key_is_needed() -> None:
    with FaultServer() as server:
        settings = ApiConfig(base_url=server.base_url, model="m", api_key_env="")

        async def go() -> str:
            api = ChatApi(settings, "teacher")
            text = (await api.answer(api.request(QUESTION))).text
            await api.close()
            return text

        assert asyncio.run(go()) == "answer to 2+2?"


@pytest.mark.parametrize(
    "show",
    [
        lambda key: key,
        lambda key: f"'{key}'",
        lambda key: f"{key[:6]}***{key[-4:]}",
        lambda key: f"{key[:8]}...{key[-8:]}",
        lambda key: f"Bearer {key}",
        lambda key: f"https://a.b/?key={key}&x=1",
        lambda key: "x" * 1990 + " " + key,
        lambda key: " " * 1990 + key,
        lambda key: "sk-proj-of-another-1234567890",
    ],
)
def test_no_part_of_a_key_is_told(show: Callable[[str], str]) -> None:
    hidden = ApiKey(KEY).hidden_in(f"Incorrect API key provided: {show(KEY)}. Find yours in your account.")
    assert not any(KEY[at : at + 6] in hidden for at in range(len(KEY) - 5))
    assert "1234567890" not in hidden
    assert hidden.startswith("Incorrect API key provided: ")
    assert len(hidden) <= 200
    assert KEY not in repr(ApiKey(KEY)) + str(vars(ApiKey("")))


def test_what_would_act_on_a_terminal_is_not_told() -> None:
    assert ApiKey(KEY).hidden_in("a\x1b[31mb\x07\u202e c\u2028d\n\u00e9") == "a [31mb c d \u00e9"


def test_a_page_that_repeats_the_key_is_told_without_it() -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = f"<html>your key: {KEY}</html>".encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    async def go() -> str:
        server = await asyncio.start_server(page, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        api = ChatApi(config(f"http://127.0.0.1:{port}/v1", max_attempts=1), "teacher")
        with pytest.raises(RequestFailed) as failed:
            await api.answer(api.request(QUESTION))
        await api.close()
        server.close()
        return str(failed.value)

    message = asyncio.run(go())
    assert "a web page instead of an answer" in message
    assert "SECRET" not in message


# ------------------------------------------------------------------------------------------ answers


def completion(**fields: Any) -> object:
    return openai.types.chat.ChatCompletion.construct(**fields)


@pytest.mark.parametrize(
    "content",
    [
        completion(),
        completion(choices=None),
        completion(choices="none"),
        completion(choices=[None]),
        completion(choices=[{}]),
        completion(error={"message": "provider is down"}),
        [],
        None,
        "plain text",
    ],
)
def test_what_holds_no_answer_is_a_failure_of_the_question(content: object) -> None:
    with pytest.raises(RequestFailed):
        answer_of(content, None, 1)


def test_an_error_in_place_of_an_answer_is_told() -> None:
    with pytest.raises(RequestFailed, match="provider is down"):
        answer_of(completion(error={"message": "provider is down"}), None, 1)


def test_an_answer_of_odd_parts_is_read_as_far_as_it_can_be() -> None:
    message = {"role": "assistant", "content": ["parts"], "refusal": ""}
    choice = {"message": message, "finish_reason": 3}
    answer = answer_of(completion(choices=[choice], model=None, usage={"prompt_tokens": "2"}), "r", 2)
    assert answer == ChatAnswer("", None, None, "", "r", None, 2)


def test_an_answer_in_parts_is_its_text() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "It is "}, {"text": "no"}, "x"]
    parts.append({"type": "text", "text": "4."})
    choice = {"message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
    assert answer_of(completion(choices=[choice]), None, 1).text == "It is 4."


def test_a_count_below_zero_is_no_count() -> None:
    choice = {"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": -1000}
    assert answer_of(completion(choices=[choice], usage=usage), None, 1).usage is None


def test_half_a_character_is_replaced_and_two_halves_are_one() -> None:
    choice = {"message": {"role": "assistant", "content": "a \ud800 b \ud83d\ude00"}, "finish_reason": "stop"}
    assert answer_of(completion(choices=[choice]), None, 1).text == "a \ufffd b \U0001f600"


def test_json_nested_too_deep_is_a_failure_of_the_question() -> None:
    api = ChatApi(config("http://localhost/v1"), "teacher")
    with pytest.raises(RequestFailed, match="no-json"), api.explain_failures(""):
        json.loads("[" * 100_000)


def test_the_key_of_a_question_is_all_of_it() -> None:
    plain = ChatRequest("m", QUESTION, {"temperature": 1.0})
    others = [
        ChatRequest("n", QUESTION, {"temperature": 1.0}),
        ChatRequest("m", (Message("system", "2+2?"),), {"temperature": 1.0}),
        ChatRequest("m", QUESTION, {"temperature": 0.5}),
        ChatRequest("m", QUESTION, {"temperature": 1.0, "top_p": 0.5}),
        ChatRequest("m", QUESTION, {"temperature": 1.0}, sample_index=1),
    ]
    assert len({request.key for request in (plain, *others)}) == 6
    again = ChatRequest("m", (Message("user", "2+2?"),), {"temperature": 1.0})
    assert plain.key == again.key
