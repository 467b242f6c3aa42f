"""Throughput of `asking.ask` against a bare loop over the same client: same requests, 50 in flight.

The server is a process of its own that takes 50 ms for an answer, so the loop is bound by the client's work
rather than by waiting: the ratio shows what pace, budget, checks and keeping each answer on disk cost.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import openai

from benchmarks.result import Result
from gadfly.api.asking import ask
from gadfly.api.chat_request import ChatRequest, Question, parameters_of
from gadfly.api.paid_answers import PaidAnswers
from gadfly.config import ApiConfig
from gadfly.records import Message
from gadfly.run_folder import RunFolder
from tests.fault_server import fault_process

_IN_FLIGHT, _PAIRS, _REQUESTS = 50, 7, 1000
_QUICK_PAIRS, _QUICK_REQUESTS = 1, 20
CASES = ("",)
_SERVER = "latency = 0.05\nanswer = lambda body: 'word ' * 200\n"


def run(case: str, quick: bool) -> Result:
    """Measure both in turn, the order changing from pair to pair."""
    pairs, requests = (_QUICK_PAIRS, _QUICK_REQUESTS) if quick else (_PAIRS, _REQUESTS)
    with tempfile.TemporaryDirectory() as temporary, fault_process(Path(temporary), _SERVER) as server:
        config = ApiConfig(
            base_url=server.base_url,
            model="m",
            api_key_env="",
            concurrency=_IN_FLIGHT,
            temperature=0.8,
            max_response_tokens=512,
            timeout_seconds=60,
        )
        rates = []
        for pair in range(pairs + 1):
            questions = _questions(config, pair, requests)
            folder = RunFolder(Path(temporary) / f"run-{pair}")
            folder.path.mkdir()
            ways = [lambda q=questions: _bare(config, q), lambda q=questions, f=folder: _ours(config, q, f)]
            seconds = {way: ways[way]() for way in ((0, 1) if pair % 2 else (1, 0))}
            rates.append((requests / seconds[0], requests / seconds[1]))
        measured = rates[1:]  # The first pair warms up.
    bare, ours = (statistics.median(rate) for rate in zip(*measured, strict=True))
    details = f"{ours:,.0f}/s against {bare:,.0f}/s, {pairs} pairs of {requests:,} requests"
    return Result.of_pairs("collect", [ours / bare for bare, ours in measured], 0.90, details)


def _questions(config: ApiConfig, pair: int, count: int) -> list[Question]:
    prompts = (f"pair {pair}, question {number}: " + "why? " * 50 for number in range(count))
    return [
        Question(ChatRequest("m", (Message("user", prompt),), parameters_of(config)), {"prompt": prompt})
        for prompt in prompts
    ]


def _ours(config: ApiConfig, questions: Sequence[Question], folder: RunFolder) -> float:
    began = time.perf_counter()
    ask(config, "teacher", questions, PaidAnswers(folder, "teacher.jsonl"), "collect")
    return time.perf_counter() - began


def _bare(config: ApiConfig, questions: Sequence[Question]) -> float:
    bodies = [
        {
            "model": "m",
            "messages": [{"role": turn.role, "content": turn.content} for turn in question.request.messages],
            **question.request.parameters,
        }
        for question in questions
    ]

    async def loop() -> None:
        slots = asyncio.Semaphore(_IN_FLIGHT)
        async with openai.AsyncOpenAI(base_url=config.base_url, api_key="none", max_retries=0) as client:

            async def one(body: dict[str, object]) -> None:
                async with slots:
                    await client.chat.completions.create(**body)

            await asyncio.gather(*(one(body) for body in bodies))

    began = time.perf_counter()
    asyncio.run(loop())
    return time.perf_counter() - began
