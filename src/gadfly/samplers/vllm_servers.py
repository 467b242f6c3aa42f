"""vLLM servers on other machines as the sampler, given the student's weights over the network.

Prompts are dealt over them by HTTP, ids in and ids out, and after every step weights are handed over
(`gadfly.samplers.vllm_weights`). Sampling, and weights through a shared folder, have been run on CPUs; the
hand-over by NCCL is written to vLLM's interface and has not been run.

A response's random numbers follow from its request alone, and rounding from whatever else a server computes
beside it, as in `gadfly.samplers.vllm`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from gadfly.distributed.processes import Processes
from gadfly.errors import ApiError
from gadfly.samplers.canary import Canary, canary_text
from gadfly.samplers.sampler import Request, Sample
from gadfly.samplers.vllm_http import (
    Body,
    Connection,
    Server,
    ServerLost,
    at_once,
    complete,
    connected,
    open_server,
)
from gadfly.samplers.vllm_weights import open_hand_over

logger = logging.getLogger(__name__)

T = TypeVar("T")
# The places of a request and of a sample in it.
Job = tuple[int, int]

_CANARY_PROMPT, _CANARY_ANSWER = 8, 24


class VllmServers:
    """Samples on vLLM servers that run elsewhere, whatever weights they were started with.

    They have to be given the student's by `update` before the first sample. After every update a canary has
    each of them compute log-probabilities of a fixed text and compares them with the student's.

    A server that is lost is left out from then on, since its weights would be old ones when it comes back;
    its responses are drawn by the others.

    Args:
        urls: of the servers, as `http://host:8000`.
        end_ids: every token that ends a response.
        canary: asks the student, once an update.
        vocabulary_size: of the student.
        folder: where weights are handed over that do not go by NCCL; servers see it by the same name.
        max_tokens: of a prompt and its response together, at most.
        max_parallel_responses: under way at once, on all servers together.
        timeout_seconds: for any one answer of a server.
        processes: who trains; the first of them hands the weights over.

    Raises:
        UserError: a server runs with other settings than it needs.
        ApiError: a server cannot be reached.
    """

    def __init__(
        self,
        urls: Sequence[str],
        end_ids: frozenset[int],
        *,
        canary: Canary,
        vocabulary_size: int,
        folder: Path,
        max_tokens: int,
        max_parallel_responses: int = 256,
        timeout_seconds: float = 600.0,
        processes: Processes | None = None,
    ):
        self._servers = [Server(url.rstrip("/"), timeout_seconds) for url in urls]
        self._end_ids = sorted(end_ids)
        self._canary = canary
        self._processes = processes or Processes()
        self._max_parallel_responses = max_parallel_responses
        self._reported_lost: set[Server] = set()
        start = canary_text(vocabulary_size, _CANARY_PROMPT)
        self._canary_request = Request(start, 1, "canary")
        self._text: list[int] = []
        at_once(self._servers, lambda connection: open_server(connection, max_tokens, start))
        self._hand_over = open_hand_over(folder)
        # The first process pauses them next, and hands over: another one that still opens them would have
        # them go on, or take what is handed over for a leftover.
        self._processes.gather("opening of the servers", None)

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand over the student's weights, and check that they arrived.

        Raises:
            AlarmError: a server computes other log-probabilities than the student afterwards.
            ApiError: no server is left, or one was lost halfway through a transfer by NCCL.
            UserError: a server lacks a setting that the hand-over needs.
        """
        self._processes.together("hand-over to the servers", lambda: self._send(iter(weights)))
        losses = [server.loss for server in self._servers]
        handed_over, *_ = self._processes.gather("servers lost at the hand-over", losses)
        # What the first process could not reach has old weights, however well others reach it.
        for server, loss in zip(self._servers, handed_over, strict=True):
            server.loss = server.loss or loss
        self._compare()

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """The samples of each request, in order. Temperature 0 is greedy; vLLM takes 0.01 for one between.

        Raises:
            ApiError: a server refuses, or none is left.
        """
        answers: dict[Job, Sample] = {}
        total = sum(request.num_samples for request in requests)
        jobs = [
            deque((index, sample) for sample in range(request.num_samples))
            for index, request in enumerate(requests)
        ]

        async def draw(connection: Connection, job: Job) -> None:
            index, sample = job
            answers[job] = await self._draw(
                connection, requests[index], sample, temperature, max_response_tokens
            )
            self._processes.progress(f"sampling: {len(answers)} of {total} responses")

        asyncio.run(self._deal(deque(group for group in jobs if group), draw))
        return [
            [answers[index, sample] for sample in range(request.num_samples)]
            for index, request in enumerate(requests)
        ]

    async def _deal(
        self, groups: deque[deque[Job]], draw: Callable[[Connection, Job], Awaitable[None]]
    ) -> None:
        """Have the servers take groups as they get through them.

        The samples of a group stay on one server, whose prefix cache then computes the prompt once.
        """

        async def work(connection: Connection, own: deque[Job]) -> None:
            while (own or groups) and not connection.server.loss:
                if not own:
                    own.extend(groups.popleft())
                job = own.popleft()
                try:
                    await draw(connection, job)
                except ServerLost:
                    groups.append(deque([job, *own]))
                    own.clear()

        while groups:
            left = self._left()
            share = max(1, self._max_parallel_responses // len(left))
            async with connected(left) as connections:
                own: list[deque[Job]] = [deque() for _ in left]
                # In turn, so that the first server does not take all before the second begins.
                turns = [pair for _ in range(share) for pair in zip(connections, own, strict=True)]
                await asyncio.gather(*(work(connection, jobs) for connection, jobs in turns))

    async def _draw(
        self, connection: Connection, request: Request, sample: int, temperature: float, cap: int
    ) -> Sample:
        prompt = request.prompt_tokens
        # Where prompt and cap exceed the model's positions, the response ends with these.
        cap = min(cap, connection.server.max_tokens - len(prompt))
        choice = await complete(
            connection,
            prompt,
            f"for a response of up to {cap} tokens",
            temperature=temperature,
            seed=request.seed(sample),
            max_tokens=cap,
            stop_token_ids=self._end_ids,
            logprobs=0,
        )
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        assert len(tokens) == len(logprobs), "one a token"
        return Sample(tuple(tokens), tuple(logprobs), choice["finish_reason"] == "stop")

    def _send(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Hand the weights over, if this is the process that does."""
        try:
            if self._processes.rank == 0:
                # Should the rest fail, servers stay paused until the next run opens them.
                self._everywhere(lambda connection: connection.post("/pause", "to pause"))
                self._hand_over.send(self._left(), weights)
                self._everywhere(_forget_prompts)
                self._everywhere(lambda connection: connection.post("/resume", "to go on"))
        finally:
            # Shards come together in all processes at once, also where this one could not use them.
            for _ in weights:
                pass

    def _compare(self) -> None:
        """The canary: the same text on every server and in the student."""
        if not self._text:
            # The student's own part is a matter of all processes, so none may be missing there.
            ((answer,),) = self._processes.together("the canary's answer", self._canary_answer)
            # What the student itself would say: in half precision, unlikely tokens are mostly rounding.
            self._text = [*self._canary_request.prompt_tokens, *answer.tokens]
        ours = self._canary.student_logprobs(self._text)
        for server, theirs in self._everywhere(self._canary_logprobs):
            self._canary.compare(server.url, ours, theirs)

    def _canary_answer(self) -> list[list[Sample]]:
        return self.sample([self._canary_request], temperature=0.0, max_response_tokens=_CANARY_ANSWER)

    async def _canary_logprobs(self, connection: Connection) -> tuple[Server, list[float]]:
        choice = await complete(
            connection,
            self._text,
            "for log-probabilities of a fixed text",
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
        )
        # The first token follows nothing.
        places = zip(choice["prompt_logprobs"][1:], self._text[1:], strict=True)
        return connection.server, [float(place[str(token)]["logprob"]) for place, token in places]

    def _everywhere(self, ask: Callable[[Connection], Awaitable[T]]) -> list[T]:
        """What `ask` brings from every server that is left, and still is at the end."""

        async def ask_or_lose(connection: Connection) -> list[T]:
            try:
                return [await ask(connection)]
            except ServerLost:
                return []

        brought = [item for items in at_once(self._left(), ask_or_lose) for item in items]
        self._left()
        return brought

    def _left(self) -> list[Server]:
        """The servers that are not lost; warns of each that is, once.

        Raises:
            ApiError: none is left.
        """
        lost = [server for server in self._servers if server.loss]
        left = [server for server in self._servers if not server.loss]
        if not left:
            reasons = "; ".join(server.loss for server in lost)
            raise ApiError(
                f"sampling.servers: none is left ({reasons}); start them, and the same command again"
            )
        for server in lost:
            if server not in self._reported_lost:
                self._reported_lost.add(server)
                logger.warning("sampling.servers: left out from now on: %s", server.loss)
        return left


async def _forget_prompts(connection: Connection) -> None:
    """Empty the prefix cache, whose keys and values are those of the old weights."""
    answer: Body = await connection.post("/reset_prefix_cache", "to empty its prefix cache")
    if not (isinstance(answer, dict) and answer.get("success", True)):
        raise ApiError(f"{connection.server.url} was asked to empty its prefix cache: it still computes")
