"""One vLLM server over HTTP: what is asked of it, for how long it is waited, and when it counts as lost."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import openai

from gadfly.errors import ApiError, UserError

T = TypeVar("T")
Body = dict[str, Any]

# Some seconds in all, for a network that falters; a server that starts anew has lost its weights anyway.
_ATTEMPTS = 4
_FIRST_WAIT_SECONDS = 0.5
_CONNECT_SECONDS = 30
# The two likeliest tokens would do, but may be as likely as one another.
_PROBED_TOKENS = 5


class ServerLost(ApiError):
    """A server that does not answer; says which, and what was waited for."""


@dataclass(eq=False)
class Server:
    """A vLLM server, and what it has said of itself.

    Attributes:
        url: without a slash at the end.
        timeout_seconds: for the whole of any one answer.
        model: the name it serves its model by.
        max_tokens: of a prompt and its response together.
        loss: why it is asked no more; empty while it is.
    """

    url: str
    timeout_seconds: float
    model: str = ""
    max_tokens: int = 0
    loss: str = ""


class Connection:
    """To one server, within one event loop; made by `connected`."""

    def __init__(self, server: Server):
        self.server = server
        seconds = server.timeout_seconds
        self.client = openai.AsyncOpenAI(
            base_url=server.url,
            # Servers for weights stand in a network of their own, without keys.
            api_key="none",
            timeout=openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
            max_retries=0,
        )

    async def get(self, path: str, wanted: str) -> Any:
        """The JSON of an answer; `wanted` says in an error what for. Raises as `post` does."""
        return await self._ask(lambda: self.client.get(path, cast_to=object), wanted, _ATTEMPTS)

    async def post(self, path: str, wanted: str, body: Body | None = None, *, once: bool = False) -> Any:
        """The same of a request with a body; `once`: not sent again where the answer failed to arrive.

        Raises:
            ServerLost: it cannot be reached, fails, or does not answer in time.
            UserError: it has no such route.
            ApiError: it refuses.
        """
        attempts = 1 if once else _ATTEMPTS
        return await self._ask(lambda: self.client.post(path, cast_to=object, body=body), wanted, attempts)

    async def _ask(self, send: Callable[[], Awaitable[object]], wanted: str, attempts: int) -> Any:
        server = self.server
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            if server.loss:
                break
            try:
                # The client's own limit is for each piece that arrives.
                async with asyncio.timeout(server.timeout_seconds):
                    return await send()
            except (TimeoutError, openai.APITimeoutError):
                failed = f"did not answer within {server.timeout_seconds:g} s"
                break
            except openai.APIStatusError as failure:
                failed = _one_line(failure.message)
                if failure.status_code == 404:
                    raise UserError(
                        f"sampling.servers: {server.url}, asked {wanted}, has no such route; start it by "
                        f"`VLLM_SERVER_DEV_MODE=1 vllm serve`, with vLLM 0.19.1 or newer"
                    ) from None
                if failure.status_code < 500:
                    raise ApiError(f"{server.url} was asked {wanted}: {failed}") from None
            except openai.APIConnectionError as failure:
                cause = failure.__cause__ or failure
                failed = _one_line(f"{type(cause).__name__}: {cause}")
        server.loss = server.loss or f"{server.url} was asked {wanted}: {failed}"
        raise ServerLost(server.loss)


@asynccontextmanager
async def connected(servers: Sequence[Server]) -> AsyncIterator[list[Connection]]:
    """Connections to servers, closed at the end."""
    async with AsyncExitStack() as stack:
        connections = [Connection(server) for server in servers]
        for connection in connections:
            stack.push_async_callback(connection.client.close)
        yield connections


def at_once(servers: Sequence[Server], ask: Callable[[Connection], Awaitable[T]]) -> list[T]:
    """What `ask` brings from each server, all asked at the same time; the first failure is raised."""

    async def ask_all() -> list[T]:
        async with connected(servers) as connections:
            return await asyncio.gather(*map(ask, connections))

    return asyncio.run(ask_all())


async def complete(connection: Connection, prompt: Sequence[int], wanted: str, **parameters: Any) -> Body:
    """One response to a prompt of ids, drawn from the whole distribution whatever the model's own defaults.

    Raises:
        ApiError: what comes back is no finished response, or none does; see `Connection.post`.
    """
    body = {
        "model": connection.server.model,
        "prompt": list(prompt),
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # Without it the end tokens that the model's folder names would end a response too.
        "ignore_eos": True,
        "return_token_ids": True,
        # Several tokens may have the same text.
        "return_tokens_as_token_ids": True,
        **parameters,
    }
    answer = await connection.post("/v1/completions", wanted, body)
    try:
        (choice,) = answer["choices"]
        is_whole = choice["finish_reason"] in ("stop", "length") and len(choice["token_ids"]) > 0
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        said = _one_line(repr(answer))
        raise ApiError(f"{connection.server.url} was asked {wanted}, and gave no whole response: {said}")
    return dict(choice)


async def open_server(connection: Connection, max_tokens: int, prompt: Sequence[int]) -> None:
    """Have a server say what it serves, and see that it gives the log-probabilities that are needed.

    Args:
        connection: to the server.
        max_tokens: of a prompt and its response together, at least.
        prompt: any few tokens, to probe it with.

    Raises:
        UserError: it runs with other settings than it needs.
        ApiError: it does not answer as a vLLM server does.
    """
    server = connection.server
    # A run that broke off may have left it paused.
    await connection.post("/resume", "to go on")
    models = await connection.get("/v1/models", "which model it serves")
    try:
        server.model, server.max_tokens = models["data"][0]["id"], int(models["data"][0]["max_model_len"])
    except (KeyError, IndexError, TypeError, ValueError):
        said = _one_line(repr(models))
        raise ApiError(f"{server.url} was asked which model it serves, and says {said}") from None
    if server.max_tokens < max_tokens:
        raise UserError(
            f"sampling.servers: {server.url} takes prompts and responses of {server.max_tokens} tokens "
            f"together, and the recipe's may have {max_tokens}; start it with --max-model-len {max_tokens}"
        )
    spreads = [await _spread(connection, prompt, temperature) for temperature in (0.5, 1.0)]
    # At half the temperature the differences of log-probabilities are twice as large; halfway between is
    # the border to those of the model itself, which are the same at both.
    if not spreads[0] > 1.5 * spreads[1]:
        raise UserError(
            f"sampling.servers: {server.url} gives log-probabilities that do not follow the temperature; "
            f"start it with --logprobs-mode processed_logprobs"
        )


async def _spread(connection: Connection, prompt: Sequence[int], temperature: float) -> float:
    """Of the likeliest tokens' log-probabilities, first to last."""
    choice = await complete(
        connection,
        prompt,
        "for the likeliest tokens",
        temperature=temperature,
        max_tokens=1,
        seed=0,
        logprobs=_PROBED_TOKENS,
    )
    # The token that was drawn is among them, in whatever place.
    likeliest = sorted(choice["logprobs"]["top_logprobs"][0].values())[-_PROBED_TOKENS:]
    return float(likeliest[-1] - likeliest[0])


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:300] + " …"
