"""A provider of OpenAI's chat, file and batch endpoints on loopback that fails to order and keeps the books.

In a thread of the test, `with FaultServer(faults=[Fault("cut")]) as server`, or as its own process, with
`fault_process` or `python tests/fault_server.py --port 8000 --script faults.py --ledger ledger.jsonl`.
A script is Python whose names that are fields of `FaultServer` set those fields.
"""

import argparse
import asyncio
import contextlib
import email.utils
import http.client
import json
import math
import re
import runpy
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, Self
from urllib.parse import parse_qs, urlsplit

Body = dict[str, Any]
CHAT = "POST /v1/chat/completions"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request: an error status, an answer that was changed, or a broken reply."""

    kind: Literal[
        "rate_limit",  # 429; Retry-After only with `seconds`, x-ratelimit-* only with `reset`
        "insufficient_quota",
        "low_balance",  # 400, as some providers say that they want money
        "server_error",  # `status`
        "bad_request",
        "context_length",
        "expired_key",  # the message shows the ends of the key that was sent
        "unknown_model",
        "wants_max_completion_tokens",  # 400 if the body has `max_tokens`, else nothing
        "null_content",
        "refusal",
        "other_model",
        "length",
        "content_filter",
        "no_finish_reason",  # the field is absent
        "empty_choices",
        "slow",  # answers after `seconds` more
        "cut",  # the connection ends in the middle of the body
        "reset",  # the connection is reset before the first byte, after the work was done
        "malformed",  # 200 and half of the JSON, as a whole body
        "html",  # 200 and a page, as of a proxy
    ]
    seconds: float | None = None
    as_date: bool = False
    """Retry-After as an HTTP date, `seconds` from then, rounded up to a whole one."""
    reset: float | None = None
    """Seconds that x-ratelimit-reset-requests announces."""
    status: int = 500


FaultPlan = Sequence[Fault | None] | Callable[[int, Body], Fault | None]
"""By number of the request from 0, beyond the end none; or a function of it and the request's body."""

Answer = Callable[[Body], str | Body]
"""The text for a chat body, or what differs: content, refusal, finish_reason, model, usage."""

_ERRORS: dict[str, tuple[int, str, str | None, str]] = {  # status, type, code, message
    "rate_limit": (429, "requests", "rate_limit_exceeded", "Rate limit reached. Please try again later."),
    "insufficient_quota": (429, "insufficient_quota", "insufficient_quota", "You exceeded your quota."),
    "low_balance": (
        400,
        "invalid_request_error",
        None,
        "Your credit balance is too low to access the API. Please go to Plans & Billing.",
    ),
    "server_error": (500, "server_error", None, "The server had an error while processing your request."),
    "bad_request": (400, "invalid_request_error", None, "Invalid value: 'temperature' must be at most 2."),
    "context_length": (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "This model's maximum context length is 8192 tokens. Please reduce the length of the messages.",
    ),
    "expired_key": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided: {ends}."),
    "wrong_key": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided: {key}."),
    "unknown_model": (404, "invalid_request_error", "model_not_found", "The model '{model}' does not exist."),
    "wants_max_completion_tokens": (
        400,
        "invalid_request_error",
        "unsupported_parameter",
        "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
    ),
    "not_found": (404, "invalid_request_error", None, "No such {what}."),
    "unreadable": (400, "invalid_request_error", None, "We could not use the body of your request: {what}."),
}
_WORTHLESS = ("empty_choices", "cut", "malformed", "html")


# ------------------------------------------------------------------------------------------- the books


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def canonical(body: Body) -> str:
    """One text for all spellings of the same body: the key of the ledger's counts."""
    return _ENCODER.encode(body)


class Entry(NamedTuple):
    """A chat request that came in or was dealt with, or a batch line that was answered."""

    event: str
    """`seen` on arrival, and then one of `paid` (a whole answer was sent), `undelivered` (the client had
    gone), `spoilt` (status 200, but nothing to keep: cut, malformed, html, empty choices), `refused` (an
    error status), `reset`."""
    number: int
    """Of the chat request, or of the line in its batch; the first is 0."""
    body: str
    in_flight: int
    """Chat requests being dealt with, at arrival including this one, at the end without it."""
    status: int | None = None
    fault: str | None = None
    batch: str | None = None


class Ledger:
    """All entries so far, oldest first; with a path, also a file of one flushed JSON line each."""

    def __init__(self, entries: Sequence[Entry] = (), path: Path | None = None) -> None:
        self.entries = list(entries)
        self._file: IO[str] | None = path.open("a", encoding="utf-8") if path else None

    @classmethod
    def parse(cls, lines: str) -> Self:
        """Of a ledger file's text; a last line without its end is left out."""
        return cls([Entry(**json.loads(line)) for line in lines.split("\n")[:-1]])

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        if self._file:
            self._file.write(json.dumps(entry._asdict()) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def lines(self) -> str:
        return "".join(json.dumps(entry._asdict()) + "\n" for entry in self.entries)

    def bodies(self, event: str) -> Counter[str]:
        """How often each canonical body met with that event."""
        return Counter(entry.body for entry in self.entries if entry.event == event)

    @property
    def paid(self) -> Counter[str]:
        return self.bodies("paid")

    @property
    def paid_undelivered(self) -> Counter[str]:
        return self.bodies("undelivered")

    @property
    def seen(self) -> Counter[str]:
        return self.bodies("seen")

    @property
    def max_in_flight(self) -> int:
        return max((entry.in_flight for entry in self.entries), default=0)

    @property
    def in_flight(self) -> int:
        """Chat requests seen but not yet dealt with."""
        return next((entry.in_flight for entry in reversed(self.entries) if not entry.batch), 0)


# ---------------------------------------------------------------------------------- requests and replies


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    content: bytes
    client_has_gone: Callable[[], bool]

    @property
    def key(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    def json(self) -> Body:
        try:
            body = json.loads(self.content)
        except ValueError as error:
            raise Refusal("unreadable", what=str(error)) from None
        if not isinstance(body, dict):
            raise Refusal("unreadable", what="not an object")
        return body


@dataclass
class Reply:
    content: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    end: Literal["whole", "cut", "reset"] = "whole"

    @classmethod
    def of(cls, body: Body) -> Self:
        return cls(json.dumps(body).encode())


class Refusal(Exception):
    """A reply with an error status; the details fill in its message."""

    def __init__(self, kind: str, *, key: str = "", param: str | None = None, **details: str) -> None:
        status, of_type, code, message = _ERRORS[kind]
        text = message.format(key=key, ends=f"{key[:6]}***{key[-4:]}", **details)
        self.body = {"error": {"message": text, "type": of_type, "param": param, "code": code}}
        self.reply = Reply(json.dumps(self.body).encode(), status)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a connection; none if the client has closed it."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        content = await reader.readexactly(int(headers.get("content-length", 0)))
    except asyncio.IncompleteReadError:
        return None
    # With its query a target costs a slow parse, which only the lists need.
    url = urlsplit(target) if "?" in target else None
    path, query = (url.path, parse_qs(url.query)) if url else (target, {})
    return Request(method, path, query, headers, content, reader.at_eof)


async def send(writer: asyncio.StreamWriter, reply: Reply) -> None:
    if reply.end == "reset":
        linger_not = struct.pack("ii", 1, 0)  # makes closing send RST
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        writer.transport.abort()
        return
    headers = {"content-type": "application/json", "content-length": len(reply.content)} | reply.headers
    head = f"HTTP/1.1 {reply.status} {http.client.responses.get(reply.status, 'Error')}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    cut = len(reply.content) // 2 if reply.end == "cut" else None
    writer.write(head.encode("latin-1") + b"\r\n" + reply.content[:cut])
    await writer.drain()


def last_user_text(body: Body) -> str:
    return str(next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), ""))


def completion(body: Body, answer: Answer, name: str) -> Body:
    """A chat completion of the body; tokens are counted as words."""
    if not isinstance(body.get("messages"), list) or not isinstance(body.get("model"), str):
        raise Refusal("unreadable", what="it needs 'model' and 'messages'")
    answered = answer(body)
    given: Body = {"content": answered} if isinstance(answered, str) else answered
    text = given["content"] if "content" in given else f"answer to {last_user_text(body)}"
    num_prompt = sum(len(str(message["content"]).split()) for message in body["messages"])
    num_answer = len((text or "").split())
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }
    message = {"role": "assistant", "content": text, "refusal": given.get("refusal")}
    choice = {"index": 0, "message": message, "finish_reason": given.get("finish_reason", "stop")}
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": given.get("model", body["model"]),
        "system_fingerprint": "fp_fault_server",
        "choices": [choice],
        "usage": given.get("usage", usage),
    }


def refuse(fault: Fault | None, body: Body, key: str = "") -> None:
    """Raise the refusal that the fault stands for, if it does."""
    if fault is None or fault.kind not in _ERRORS:
        return
    param = "max_tokens" if fault.kind == "wants_max_completion_tokens" else None
    if param and param not in body:
        return
    refusal = Refusal(fault.kind, key=key, param=param, model=str(body.get("model")))
    if fault.kind == "server_error":
        refusal.reply.status = fault.status
    headers = refusal.reply.headers
    if fault.seconds is not None:
        then = math.ceil(time.time() + fault.seconds)
        headers["retry-after"] = (
            email.utils.formatdate(then, usegmt=True) if fault.as_date else f"{fault.seconds:g}"
        )
    if fault.reset is not None:
        headers |= limit_headers(500, 0, fault.reset)
    raise refusal


def edited(fault: Fault | None, answer: Body) -> Body:
    """The completion as the fault wants it."""
    choice = answer["choices"][0]
    match fault and fault.kind:
        case "null_content":
            choice["message"]["content"] = None
        case "refusal":
            choice["message"] |= {"content": None, "refusal": "I cannot help with that."}
        case "other_model":
            answer["model"] = "another-model"
        case "length" | "content_filter" as reason:
            choice["finish_reason"] = reason
        case "no_finish_reason":
            del choice["finish_reason"]
        case "empty_choices":
            answer["choices"] = []
    return answer


def broken(fault: Fault | None, reply: Reply) -> Reply:
    """The reply as the fault lets it through."""
    match fault and fault.kind:
        case "cut" | "reset" as end:
            reply.end = end
        case "malformed":
            reply.content = reply.content[: len(reply.content) // 2]
        case "html":
            page = b"<!DOCTYPE html><html><body><h1>Sign in to the proxy</h1></body></html>"
            return Reply(page, headers={"content-type": "text/html; charset=utf-8"})
    return reply


def planned(plan: FaultPlan, number: int, body: Body) -> Fault | None:
    if callable(plan):
        return plan(number, body)
    return plan[number] if number < len(plan) else None


def spell_duration(seconds: float) -> str:
    """As in x-ratelimit-reset-requests: 20ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"


def limit_headers(limit: int, remaining: int, reset: float) -> dict[str, str]:
    names = {"limit": str(limit), "remaining": str(remaining), "reset": spell_duration(reset)}
    return {f"x-ratelimit-{name}-requests": value for name, value in names.items()}


class TokenBucket:
    """Lets `per_minute` requests through, `burst` of them at once; those refused cost nothing."""

    def __init__(self, per_minute: int, burst: int) -> None:
        self._per_minute, self._burst = per_minute, burst
        self._tokens, self._then = float(burst), time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._then) * self._per_minute / 60)
        self._then = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def headers(self) -> dict[str, str]:
        """Reset is the time until the whole burst is free again."""
        full = (self._burst - self._tokens) * 60 / self._per_minute
        return limit_headers(self._per_minute, int(self._tokens), full)


# ------------------------------------------------------------------------------------ files and batches


@dataclass(frozen=True)
class BatchPlan:
    """How one batch fares."""

    polls: int = 2
    """It ends at this many GETs of it; the one before shows `in_progress`, creation `validating`."""
    ends: Literal["completed", "failed", "expired"] = "completed"
    done: float = 0.5
    """Share of the lines, the first ones, that an expired or cancelled batch has answered."""
    faults: FaultPlan = ()
    """By number of the line in the input; the kinds that break a reply have no meaning here."""
    code: str = "invalid_request"
    """Of the error that a failed batch has."""


class Batches:
    """The files and batches of one account, in memory; an answered line is paid when its batch ends."""

    def __init__(self, plans: Sequence[BatchPlan], answer: Answer, ledger: Ledger) -> None:
        self._plans, self._answer, self._ledger = plans, answer, ledger
        self._files: dict[str, tuple[Body, bytes]] = {}
        self._batches: dict[str, Body] = {}
        self._polls: Counter[str] = Counter()

    def add_file(self, content: bytes, filename: str, purpose: str) -> Body:
        file_id = f"file-{len(self._files) + 1}"
        file = {
            "id": file_id,
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self._files[file_id] = file, content
        return file

    def upload(self, request: Request) -> Body:
        boundary = re.search(r'boundary="?([^";]+)', request.headers.get("content-type", ""))
        if boundary is None:
            raise Refusal("unreadable", what="not multipart")
        parts = {}
        for part in request.content.split(b"--" + boundary[1].encode())[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            names = dict(re.findall(rb'\b(name|filename)="([^"]*)"', head))
            parts[names[b"name"]] = names.get(b"filename", b""), content.removesuffix(b"\r\n")
        filename, content = parts[b"file"]
        return self.add_file(content, filename.decode(), parts[b"purpose"][1].decode())

    def content(self, file_id: str) -> bytes:
        if file_id not in self._files:
            raise Refusal("not_found", what=f"file: {file_id}")
        return self._files[file_id][1]

    def files(self, query: dict[str, list[str]]) -> Body:
        return _page([file for file, _ in self._files.values()], query)

    def create(self, body: Body) -> Body:
        self.content(body["input_file_id"])
        batch: Body = {
            "id": f"batch_{len(self._batches) + 1}",
            "object": "batch",
            "status": "validating",
            "created_at": int(time.time()),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        taken = ("endpoint", "input_file_id", "completion_window", "metadata")
        batch |= {name: body.get(name) for name in taken}
        self._batches[batch["id"]] = batch
        return batch

    def list(self, query: dict[str, list[str]]) -> Body:
        return _page(list(self._batches.values()), query)

    def poll(self, batch_id: str) -> Body:
        batch = self._find(batch_id)
        self._polls[batch_id] += 1
        plan = self._plan(batch)
        if batch["status"] == "cancelling":
            self._end(batch, plan, "cancelled")
        elif batch["status"] in ("validating", "in_progress"):
            if self._polls[batch_id] >= plan.polls:
                self._end(batch, plan, plan.ends)
            else:
                batch["status"] = "in_progress"
        return batch

    def cancel(self, batch_id: str) -> Body:
        batch = self._find(batch_id)
        if batch["status"] not in ("validating", "in_progress"):
            raise Refusal("unreadable", what=f"cannot cancel a batch that is {batch['status']}")
        batch["status"] = "cancelling"
        return batch

    def _find(self, batch_id: str) -> Body:
        if batch_id not in self._batches:
            raise Refusal("not_found", what=f"batch: {batch_id}")
        return self._batches[batch_id]

    def _plan(self, batch: Body) -> BatchPlan:
        place = list(self._batches).index(batch["id"])
        return self._plans[place] if place < len(self._plans) else BatchPlan()

    def _end(self, batch: Body, plan: BatchPlan, status: str) -> None:
        batch["status"] = status
        batch[f"{status}_at"] = int(time.time())
        try:
            lines = [json.loads(line) for line in self.content(batch["input_file_id"]).splitlines()]
            if status == "failed" or len({line["custom_id"] for line in lines}) < len(lines):
                raise ValueError("duplicate custom_id")
        except ValueError as error:
            batch["status"] = "failed"
            problem = {"code": plan.code, "message": str(error), "line": 1, "param": None}
            batch["errors"] = {"object": "list", "data": [problem]}
            return
        num_done = len(lines) if status == "completed" else int(len(lines) * plan.done)
        answered: list[Body] = []
        failed: list[Body] = []
        for number, line in enumerate(lines):
            result: Body = {"id": f"batch_req_{number}", "custom_id": line["custom_id"], "response": None}
            if number >= num_done:
                message = "This request could not be executed before the batch ended."
                failed.append(result | {"error": {"code": f"batch_{status}", "message": message}})
                continue
            response = self._respond(batch["id"], number, line["body"], plan.faults)
            result |= {"response": response, "error": None}
            (answered if response["status_code"] == 200 else failed).append(result)
        for name, results in (("output", answered), ("error", failed)):
            if results:
                # As with the real ones, no line may be looked for at its place in the input.
                text = "".join(json.dumps(result) + "\n" for result in reversed(results))
                file = self.add_file(text.encode(), f"{batch['id']}_{name}.jsonl", "batch_output")
                batch[f"{name}_file_id"] = file["id"]
        batch["request_counts"] = {"total": len(lines), "completed": len(answered), "failed": len(failed)}

    def _respond(self, batch_id: str, number: int, body: Body, faults: FaultPlan) -> Body:
        fault = planned(faults, number, body)
        response: Body = {"status_code": 200, "request_id": f"{batch_id}_{number}"}
        try:
            refuse(fault, body)
            response["body"] = edited(fault, completion(body, self._answer, f"{batch_id}-{number}"))
        except Refusal as refusal:
            return response | {"status_code": refusal.reply.status, "body": refusal.body}
        kind = fault.kind if fault else None
        event = "spoilt" if kind in _WORTHLESS else "paid"
        self._ledger.add(Entry(event, number, canonical(body), 0, 200, kind, batch_id))
        return response


def _page(items: list[Body], query: dict[str, list[str]]) -> Body:
    """A page of the items, newest first, that begins behind the one named `after`."""
    newest = items[::-1]
    if after := query.get("after"):
        ids = [item["id"] for item in newest]
        newest = newest[ids.index(after[0]) + 1 :]
    limit = int(query.get("limit", ["20"])[0])
    return {"object": "list", "data": newest[:limit], "has_more": len(newest) > limit}


# ------------------------------------------------------------------------------------------- the server


@dataclass(kw_only=True)
class FaultServer:
    """The provider in a thread, from `with` to its end; an error in a plan or answer is raised there.

    With a `key`, anything but `Authorization: Bearer KEY` gets 401 and a body that repeats it in full. With
    `models`, other names get 404. With `requests_per_minute`, a token bucket of `burst` (a minute's worth
    unless given) refuses chat requests, and each reply to one has x-ratelimit-* headers.
    """

    answer: Answer = field(default=lambda body: f"answer to {last_user_text(body)}")
    faults: FaultPlan = ()
    """Of chat requests, numbered from 0 as they arrive, those refused for other reasons too."""
    route_faults: Mapping[str, FaultPlan] = field(default_factory=dict)
    """Of other routes, such as `POST /v1/batches` or `GET /v1/batches/{id}`, each counted for itself.
    A reply is slow or broken after the request had its effect, and refused before."""
    batches: Sequence[BatchPlan] = ()
    """In order of creation; those beyond the end complete at the second poll."""
    latency: float = 0.0
    """Seconds the model takes for each chat answer, however many are in flight."""
    key: str | None = None
    models: Sequence[str] = ()
    requests_per_minute: int | None = None
    burst: int | None = None
    port: int = 0
    ledger_path: Path | None = None

    base_url: str = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(path=self.ledger_path)
        self._desk = Batches(self.batches, self.answer, self.ledger)
        limit = self.requests_per_minute
        self._bucket = TokenBucket(limit, self.burst or limit) if limit else None
        self._seen: Counter[str] = Counter()
        self._in_flight = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._mistakes: list[Exception] = []

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-server", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        except BaseException:
            self._end_thread()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._end_thread()
        if self._mistakes:
            raise self._mistakes[0]

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self.ledger.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1000)
        self.port = self._server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    async def _stop(self) -> None:
        for listening in self._server.sockets:
            self._loop.remove_reader(listening.fileno())
        # A connection accepted just before takes a few turns to reach its task, which alone can close it.
        for _ in range(10):
            await asyncio.sleep(0)
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            whole = True
            while whole and (request := await read_request(reader)) is not None:
                reply = await self._reply(request)
                await send(writer, reply)
                whole = reply.end == "whole"
        except ConnectionError:
            pass  # The client went; what that cost is in the ledger.
        except asyncio.CancelledError:
            writer.transport.abort()  # A client that does not read must not hold up the end.
        except Exception as mistake:
            self._mistakes.append(mistake)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()
            self._connections.discard(task)

    async def _reply(self, request: Request) -> Reply:
        route = f"{request.method} {request.path}"
        if route == CHAT:
            return await self._chat(request)
        if route == "GET /ledger":
            return Reply(self.ledger.lines().encode(), headers={"content-type": "application/jsonl"})
        try:
            self._check_key(request)
            return await self._other(request)
        except Refusal as refusal:
            return refusal.reply

    def _check_key(self, request: Request) -> None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refusal("wrong_key", key=request.key)

    async def _chat(self, request: Request) -> Reply:
        try:
            body = request.json()
        except Refusal as refusal:
            return refusal.reply
        number, key = self._seen[CHAT], canonical(body)
        self._seen[CHAT] += 1
        self._in_flight += 1
        self.ledger.add(Entry("seen", number, key, self._in_flight))
        fault, reply = None, Reply(b"", end="reset")  # stays if the server stops or a plan raises
        try:
            fault = planned(self.faults, number, body)
            reply = await self._complete(request, body, number, fault)
        except Refusal as refusal:
            reply = refusal.reply
        finally:
            # The books are written before the bytes leave, so who holds an answer finds it there.
            self._in_flight -= 1
            kind = fault.kind if fault else None
            event = self._event(reply, kind, request.client_has_gone())
            self.ledger.add(Entry(event, number, key, self._in_flight, reply.status, kind))
        reply.headers |= self._bucket.headers() if self._bucket else {}
        reply.headers["x-request-id"] = f"req_{number}"
        return reply

    def _event(self, reply: Reply, kind: str | None, client_has_gone: bool) -> str:
        if reply.status != 200:
            return "refused"
        if reply.end == "reset":
            return "reset"
        if kind in _WORTHLESS:
            return "spoilt"
        return "undelivered" if client_has_gone else "paid"

    async def _complete(self, request: Request, body: Body, number: int, fault: Fault | None) -> Reply:
        self._check_key(request)
        if self._bucket and not self._bucket.take():
            raise Refusal("rate_limit")
        if self.models and body.get("model") not in self.models:
            raise Refusal("unknown_model", model=str(body.get("model")))
        refuse(fault, body, request.key)
        answer = edited(fault, completion(body, self.answer, str(number)))
        slow = fault.seconds or 0 if fault and fault.kind == "slow" else 0
        if self.latency + slow:
            await asyncio.sleep(self.latency + slow)
        return broken(fault, Reply.of(answer))

    async def _other(self, request: Request) -> Reply:
        """Every route but chat, with its faults."""
        parts = request.path.strip("/").split("/")
        name = "/".join([*parts[:2], *("{id}" for _ in parts[2:3]), *parts[3:]])
        route, item = f"{request.method} /{name}", parts[2] if len(parts) > 2 else ""
        number = self._seen[route]
        self._seen[route] += 1
        body = request.json() if route == "POST /v1/batches" else {}
        fault = planned(self.route_faults.get(route, ()), number, body)
        refuse(fault, body, request.key)
        desk = self._desk
        match route:
            case "GET /v1/models":
                common = {"object": "model", "created": 0, "owned_by": "tests"}
                reply = Reply.of({"object": "list", "data": [{"id": name} | common for name in self.models]})
            case "POST /v1/files":
                reply = Reply.of(desk.upload(request))
            case "GET /v1/files":
                reply = Reply.of(desk.files(request.query))
            case "GET /v1/files/{id}/content":
                reply = Reply(desk.content(item), headers={"content-type": "application/octet-stream"})
            case "POST /v1/batches":
                reply = Reply.of(desk.create(body))
            case "GET /v1/batches":
                reply = Reply.of(desk.list(request.query))
            case "GET /v1/batches/{id}":
                reply = Reply.of(desk.poll(item))
            case "POST /v1/batches/{id}/cancel":
                reply = Reply.of(desk.cancel(item))
            case _:
                raise Refusal("not_found", what=f"path: {request.path}")
        if fault and fault.kind == "slow":
            await asyncio.sleep(fault.seconds or 0)
        return broken(fault, reply)


# ------------------------------------------------------------------------------------ its own process


class HasLedger(Protocol):
    @property
    def ledger(self) -> Ledger: ...


def settled_ledger(server: HasLedger, timeout: float = 10.0) -> Ledger:
    """The ledger once no chat request is in flight, such as those of a client that was killed."""
    end = time.monotonic() + timeout
    while (ledger := server.ledger).in_flight:
        if time.monotonic() > end:
            raise TimeoutError(f"{ledger.in_flight} chat requests are still in flight after {timeout:g} s")
        time.sleep(0.01)
    return ledger


@dataclass(frozen=True)
class ServerProcess:
    """A server in its own process."""

    base_url: str
    ledger_path: Path
    """The file it writes; whole lines, also when the process was killed."""
    process: subprocess.Popen[str]

    @property
    def ledger(self) -> Ledger:
        """Asked of the process; `Ledger.parse` reads the file once that is gone."""
        connection = http.client.HTTPConnection(urlsplit(self.base_url).netloc, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/ledger")
            return Ledger.parse(connection.getresponse().read().decode())


@contextlib.contextmanager
def fault_process(folder: Path, script: str = "") -> Iterator[ServerProcess]:
    """Run a server with this script in its own process; it writes only below the folder."""
    script_path, ledger_path = folder / "faults.py", folder / "ledger.jsonl"
    script_path.write_text(script, encoding="utf-8")
    command = [sys.executable, __file__, "--script", str(script_path), "--ledger", str(ledger_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not (base_url := process.stdout.readline().strip()):
                raise RuntimeError(f"{' '.join(command)}: did not start; its error is on stderr")
            yield ServerProcess(base_url, ledger_path, process)
        finally:
            process.kill()


def main() -> None:
    """Serve until killed, and print the base URL when ready."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--ledger", type=Path)
    options = parser.parse_args()
    given = runpy.run_path(str(options.script)) if options.script else {}
    names = {item.name for item in fields(FaultServer) if item.init} - {"port", "ledger_path"}
    settings = {name: given[name] for name in names & given.keys()}
    with FaultServer(port=options.port, ledger_path=options.ledger, **settings) as server:
        sys.stdout.write(f"{server.base_url}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
