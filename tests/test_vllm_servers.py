"""vLLM servers as the sampler: against a server in this process that speaks their routes, and a real one.

The one here serves a table of logits, one row for each token that may come last, so that what is drawn, its
log-probabilities and weights that are handed over can be computed beside it. The slow test starts a real
server, in an environment that has vLLM (`GADFLY_VLLM_PYTHON`, or one that it makes).
"""

import itertools
import json
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from side_by_side import side_by_side
from test_vllm_sampler import install
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel
from wide_llama import wide_llama

from gadfly.distributed.processes import Processes
from gadfly.errors import AlarmError, ApiError, ConfigError, UserError
from gadfly.models import load_language_model
from gadfly.recipe_file import load_recipe
from gadfly.samplers.canary import Canary
from gadfly.samplers.dealt import DealtSampler
from gadfly.samplers.sampler import Request, Sample, Sampler
from gadfly.samplers.vllm_http import Server
from gadfly.samplers.vllm_servers import VllmServers
from gadfly.samplers.vllm_weights import AllServers, FolderHandOver

VOCABULARY, END = 29, 3
PAUSED_ROUTES = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]


def random_table(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def table_logprobs(table: torch.Tensor, last: int, temperature: float) -> list[float]:
    return torch.log_softmax(table[last].double() / temperature, -1).tolist()


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that no longer wait."""


@dataclass
class TableServer:
    """vLLM's routes over a table of logits.

    Attributes:
        fault: what goes wrong with a request of this path and body, if anything: `drop` the connection,
            answer `late`, or an error status.
        calls: path and body of every request, in the order they came.
        peak: requests that were under way at once.
    """

    table: torch.Tensor
    fault: Callable[[str, dict[str, Any]], str | int | None] = lambda path, body: None
    mode: str = "processed_logprobs"
    max_model_len: int = 64
    num_workers: int = 1
    answer_seconds: float = 0.0
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        self.lock, self.under_way, self.closed = threading.Lock(), 0, threading.Event()
        self.http = QuietServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self.http.shutdown()
            self.thread.join()
            self.http.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == path]

    def drawn(self) -> list[dict[str, Any]]:
        """The requests of samples, without those of the probe and the canary."""
        return [body for body in self.bodies("/v1/completions") if body.get("logprobs") == 0]

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.respond({})

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.respond(json.loads(text or b"{}"))

            def respond(self, body: dict[str, Any]) -> None:
                with server.lock:
                    server.calls.append((self.path, body))
                    server.under_way += 1
                    server.peak = max(server.peak, server.under_way)
                fault = "drop" if server.closed.is_set() else server.fault(self.path, body)
                if fault is None:
                    time.sleep(server.answer_seconds)
                elif fault == "late":
                    server.closed.wait(20)
                with server.lock:
                    server.under_way -= 1
                if fault in ("drop", "late"):
                    self.close_connection = True
                    return
                answer = {"error": {"message": "told so"}} if fault else server.answer(self.path, body)
                status = fault or (404 if answer is None else 200)
                sent = json.dumps(answer).encode()
                self.send_response(int(status))
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *words: object) -> None:
                pass

        return Handler

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if path == "/v1/models":
            return {"data": [{"id": "served", "max_model_len": self.max_model_len}]}
        if path == "/v1/completions":
            return {"choices": [self.complete(body)]}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            files = sorted(Path(body["kwargs"]["weights_path"]).iterdir())
            self.table = {name: value for file in files for name, value in load_file(file).items()}["table"]
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/get_world_size":
            return {"world_size": self.num_workers}
        known = ("pause", "resume", "init_weight_transfer_engine", "start_weight_update", "update_weights")
        return {} if path.strip("/") in (*known, "finish_weight_update") else None

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["model"] == "served"
        assert len(body["prompt"]) + body["max_tokens"] <= self.max_model_len
        rng = np.random.default_rng(body.get("seed"))
        shown = body["temperature"] or 1.0 if self.mode == "processed_logprobs" else 1.0
        tokens, logprobs, likeliest = [], [], []
        for _ in range(body["max_tokens"]):
            last = [*body["prompt"], *tokens][-1]
            chances = np.exp(table_logprobs(self.table, last, body["temperature"] or 1e-6))
            row = table_logprobs(self.table, last, shown)
            tokens.append(int(rng.choice(VOCABULARY, p=chances / chances.sum())))
            logprobs.append(row[tokens[-1]])
            top = sorted(range(VOCABULARY), key=lambda token: -row[token])[: body.get("logprobs") or 0]
            likeliest.append({f"token_id:{token}": row[token] for token in {*top, tokens[-1]}})
            if tokens[-1] in body.get("stop_token_ids", ()):
                break
        is_ended = tokens[-1] in body.get("stop_token_ids", ())
        return {
            "finish_reason": "stop" if is_ended else "length",
            "token_ids": tokens,
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": likeliest},
            "prompt_logprobs": [None, *self.following(body["prompt"])],
        }

    def following(self, text: Sequence[int]) -> list[dict[str, Any]]:
        rows = [table_logprobs(self.table, last, 1.0) for last in text[:-1]]
        return [{str(token): {"logprob": row[token]}} for token, row in zip(text[1:], rows, strict=True)]


@dataclass
class Case:
    """A student that is a table, servers with other tables, and a way to open a sampler on them."""

    folder: Path
    servers: list[TableServer]
    table: torch.Tensor = field(default_factory=lambda: random_table(0))

    def open(self, *, timeout_seconds: float = 20.0, **changed: Any) -> VllmServers:
        settings: dict[str, Any] = {
            "canary": Canary(self.student_logprobs),
            "vocabulary_size": VOCABULARY,
            "folder": self.folder,
            "max_tokens": 60,
            "max_parallel_responses": 8,
            "timeout_seconds": timeout_seconds,
        }
        urls = changed.pop("urls", [server.url for server in self.servers])
        return VllmServers(urls, frozenset({END}), **(settings | changed))

    def student_logprobs(self, tokens: Sequence[int]) -> list[float]:
        pairs = itertools.pairwise(tokens)
        return [table_logprobs(self.table, last, 1.0)[token] for last, token in pairs]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "bias", torch.zeros(2)
        yield "table", self.table


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    servers = [TableServer(random_table(seed)) for seed in (1, 2)]
    # A list of its own: a test may take some out, and one that is not closed keeps Python from ending.
    yield Case(tmp_path / "weights", list(servers))
    for server in servers:
        server.close()


def requests_of(count: int, num_samples: int = 4) -> list[Request]:
    return [Request((5, 6 + number), num_samples, f"stream {number}") for number in range(count)]


def test_every_response_has_its_own_seed_and_comes_back_in_its_place(case: Case) -> None:
    sampler, requests = case.open(), requests_of(6)
    assert isinstance(sampler, Sampler)
    sampler.update(case.weights())
    answers = sampler.sample(requests, temperature=0.8, max_response_tokens=12)
    expected = case.servers[0]
    for request, group in zip(requests, answers, strict=True):
        assert len(group) == 4
        for number, sample in enumerate(group):
            body = {"prompt": list(request.prompt_tokens), "seed": request.seed(number), "max_tokens": 12}
            alone = expected.complete(
                {"model": "served", "temperature": 0.8, "stop_token_ids": [END], **body}
            )
            assert sample.tokens == tuple(alone["token_ids"])
            assert sample.logprobs == pytest.approx(alone["logprobs"]["token_logprobs"])
            assert sample.finished == (sample.tokens[-1] == END)
    assert {sample.finished for group in answers for sample in group} == {True, False}


def test_prompts_are_dealt_over_the_servers_and_each_stays_on_one(case: Case) -> None:
    sampler = case.open()
    sampler.sample(requests_of(12), temperature=1.0, max_response_tokens=6)
    prompts = [[tuple(body["prompt"]) for body in server.drawn()] for server in case.servers]
    assert len(prompts[0]) + len(prompts[1]) == 48
    assert min(map(len, prompts)) >= 8
    assert not set(prompts[0]) & set(prompts[1])


def test_no_more_responses_are_under_way_than_allowed_and_as_many_as_that(case: Case) -> None:
    for server in case.servers:
        server.answer_seconds = 0.05
    case.open(max_parallel_responses=6).sample(requests_of(8), temperature=1.0, max_response_tokens=4)
    assert [server.peak for server in case.servers] == [3, 3]


def test_no_requests_give_no_samples(case: Case) -> None:
    assert case.open().sample([], temperature=1.0, max_response_tokens=4) == []


def test_a_response_ends_where_the_models_positions_do(case: Case) -> None:
    ((sample,),) = case.open().sample(
        [Request((5,) * 60, 1, "long")], temperature=1.0, max_response_tokens=40
    )
    assert len(sample.tokens) <= 4


def test_a_connection_that_breaks_is_tried_again(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    sampler, broken = case.open(), []

    def first_ones(path: str, body: dict[str, Any]) -> str | int | None:
        broken.append(path)
        return {1: "drop", 2: 503}.get(len(broken))

    for server in case.servers:
        server.fault = first_ones
    (group,) = sampler.sample(requests_of(1), temperature=1.0, max_response_tokens=4)
    assert len(group) == 4
    assert not caplog.records


def test_the_requests_of_a_server_that_is_gone_go_to_the_others(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    sampler, requests = case.open(), requests_of(6)
    sampler.update(case.weights())
    before = sampler.sample(requests, temperature=0.8, max_response_tokens=6)
    num_drawn = len(case.servers[1].drawn())

    def after_three(path: str, body: dict[str, Any]) -> str | None:
        return "drop" if len(case.servers[0].calls) > num_calls + 3 else None

    num_calls = len(case.servers[0].calls)
    case.servers[0].fault = after_three
    assert sampler.sample(requests, temperature=0.8, max_response_tokens=6) == before
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"sampling.servers: left out from now on: {case.servers[0].url} was asked")
    assert len(case.servers[1].drawn()) >= num_drawn + 21
    num_calls_at_end = len(case.servers[0].calls)
    case.table = random_table(9)
    sampler.update(case.weights())
    assert len(case.servers[0].calls) == num_calls_at_end


def test_when_all_are_gone_one_line_names_each(case: Case) -> None:
    sampler = case.open()
    for server in case.servers:
        server.close()
    with pytest.raises(ApiError, match=r"none is left .*start them, and the same command") as raised:
        sampler.sample(requests_of(2), temperature=1.0, max_response_tokens=4)
    assert "\n" not in str(raised.value)
    assert all(server.url in str(raised.value) for server in case.servers)


def test_a_server_that_answers_too_late_is_named_with_what_was_waited_for(case: Case) -> None:
    del case.servers[1:]
    sampler = case.open(timeout_seconds=0.5)
    case.servers[0].fault = lambda path, body: "late"
    waited = f"{case.servers[0].url} was asked for a response of up to 4 tokens: did not answer within 0.5 s"
    with pytest.raises(ApiError, match=waited):
        sampler.sample(requests_of(1), temperature=1.0, max_response_tokens=4)


def test_a_refusal_is_told_and_not_repeated(case: Case) -> None:
    sampler = case.open()
    for server in case.servers:
        server.fault = lambda path, body: 400
        server.calls.clear()
    with pytest.raises(ApiError, match=r"was asked for a response of up to 4 tokens: .*told so"):
        sampler.sample(requests_of(1, 1), temperature=1.0, max_response_tokens=4)
    assert sum(len(server.calls) for server in case.servers) == 1


def test_a_server_whose_logprobs_are_the_models_own_is_refused(case: Case) -> None:
    case.servers[1].mode = "raw_logprobs"
    with pytest.raises(UserError, match=f"{case.servers[1].url} .*--logprobs-mode processed_logprobs"):
        case.open()


def test_a_server_out_of_development_mode_is_refused(case: Case) -> None:
    case.servers[0].fault = lambda path, body: 404 if path == "/resume" else None
    with pytest.raises(UserError, match=f"{case.servers[0].url}, asked to go on, .*VLLM_SERVER_DEV_MODE=1"):
        case.open()


def test_a_server_that_takes_too_few_tokens_is_refused(case: Case) -> None:
    case.servers[1].max_model_len = 65
    with pytest.raises(UserError, match=f"{case.servers[0].url} takes .* 64 tokens .*--max-model-len 65"):
        case.open(max_tokens=65)


def test_a_server_that_is_not_there_is_told_when_the_sampler_opens(case: Case) -> None:
    case.servers[1].close()
    with pytest.raises(ApiError, match=f"{case.servers[1].url} was asked to go on: "):
        case.open()


def test_an_update_pauses_hands_over_forgets_prompts_and_goes_on(case: Case) -> None:
    sampler = case.open()
    for server in case.servers:
        server.calls.clear()
    sampler.update(case.weights())
    for server in case.servers:
        routes = [path for path, _ in server.calls if path in PAUSED_ROUTES]
        assert routes == PAUSED_ROUTES
        assert torch.equal(server.table, case.table)
    assert list(case.folder.iterdir()) == []


def test_weights_that_do_not_arrive_raise_the_alarm(case: Case) -> None:
    sampler = case.open()
    sampler.update(case.weights())
    case.table = random_table(7)
    case.servers[1].answer = lambda path, body: (  # type: ignore[method-assign]
        {} if path == "/collective_rpc" else TableServer.answer(case.servers[1], path, body)
    )
    message = (
        rf"{case.servers[1].url} gives .* nats from the student's .*its last update included.*; try another"
    )
    with pytest.raises(AlarmError, match=message):
        sampler.update(case.weights())


def test_a_server_that_cannot_take_the_weights_is_left_out(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = case.open()
    case.servers[0].fault = lambda path, body: 500 if path == "/collective_rpc" else None
    sampler.update(case.weights())
    assert f"{case.servers[0].url} was asked to read weights from {case.folder}" in caplog.text
    sampler.sample(requests_of(2), temperature=1.0, max_response_tokens=4)
    assert not case.servers[0].drawn()


def test_a_prefix_cache_that_is_not_emptied_is_told(case: Case) -> None:
    sampler = case.open()
    case.servers[0].answer = lambda path, body: (  # type: ignore[method-assign]
        {"success": False}
        if path == "/reset_prefix_cache"
        else TableServer.answer(case.servers[0], path, body)
    )
    with pytest.raises(ApiError, match=f"{case.servers[0].url} was asked to empty its prefix cache"):
        sampler.update(case.weights())


def test_workers_of_all_servers_join_one_group_each_at_its_own_place(case: Case) -> None:
    case.servers[0].num_workers = 4
    servers = AllServers([Server(server.url, timeout_seconds=20.0) for server in case.servers])
    assert servers.num_workers == [4, 1]
    servers.init_weight_transfer_engine({"rank_offset": 1, "world_size": 6})
    servers.begin()
    for names in (["a"], ["b", "c"]):
        servers.start_weight_update()
        servers.update_weights({"names": names})
        servers.finish_weight_update()
    servers.end()
    for server, place in zip(case.servers, [1, 5], strict=True):
        assert server.calls == [
            ("/get_world_size", {}),
            ("/init_weight_transfer_engine", {"init_info": {"rank_offset": place, "world_size": 6}}),
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"names": ["a"]}}),
            ("/update_weights", {"update_info": {"names": ["b", "c"]}}),
            ("/finish_weight_update", {}),
        ]


# Several trainers.


def in_shards(table: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The table as a student in shards gives it: only if all processes ask."""
    held = distribute_tensor(table, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    yield "bias", torch.zeros(2)
    yield "table", held.full_tensor()


def train_and_sample(processes: Processes, urls: list[str], folder: Path) -> list[list[list[Sample]]]:
    """What one of several trainers samples after each of three updates."""
    # One of them comes late.
    time.sleep(processes.rank)
    student = Case(folder, [])
    canary = Canary(student.student_logprobs)
    sampler = DealtSampler(student.open(urls=urls, canary=canary, processes=processes), processes)
    seen = []
    for phase in range(3):
        student.table = random_table(10 + phase)
        sampler.update(in_shards(student.table))
        seen.append(sampler.sample(phase_requests(phase), temperature=0.8, max_response_tokens=6))
    return seen


def phase_requests(phase: int) -> list[Request]:
    return [Request((5, phase, 6 + number), 4, f"phase {phase} stream {number}") for number in range(6)]


@pytest.mark.slow
def test_several_trainers_hand_over_once_share_the_work_and_see_the_samples_of_one(case: Case) -> None:
    def unreachable_at_last(path: str, body: dict[str, Any]) -> int | None:
        is_third = path == "/collective_rpc" and len(case.servers[0].bodies(path)) == 3
        return 500 if is_third else None

    case.servers[0].fault = unreachable_at_last
    seen, others = side_by_side(train_and_sample, [server.url for server in case.servers], case.folder)
    assert seen == others
    for server in case.servers:
        # The late one opened it before it was paused for the first time.
        routes = [path for path, _ in server.calls if path in (*PAUSED_ROUTES, "/v1/models")]
        assert routes[:4] == ["/resume", "/v1/models"] * 2
        assert routes[4:12] == PAUSED_ROUTES * 2
        assert len(server.bodies("/collective_rpc")) == 3
    drawn = [[tuple(body["prompt"]) for body in server.drawn()] for server in case.servers]
    for phase in range(3):
        prompts = [request.prompt_tokens for request in phase_requests(phase)]
        counts = [[server_prompts.count(prompt) for prompt in prompts] for server_prompts in drawn]
        # Each response once, though both asked for all; nothing of the server that the first could not reach.
        assert [sum(pair) for pair in zip(*counts, strict=True)] == [4] * 6
        assert all(map(any, counts)) == (phase < 2)
    case.table = random_table(12)
    case.servers[0].fault = lambda path, body: None
    alone = case.open()
    alone.update(case.weights())
    assert alone.sample(phase_requests(2), temperature=0.8, max_response_tokens=6) == seen[2]


def hand_over_in_vain(processes: Processes, urls: list[str], folder: Path) -> list[str]:
    """What one of several trainers hears when its second update reaches nobody, and the shards it met."""
    student = Case(folder, [])
    sampler = DealtSampler(
        student.open(urls=urls, canary=Canary(student.student_logprobs), processes=processes), processes
    )
    sampler.update(in_shards(student.table))
    shards = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in in_shards(student.table):
            shards.append(name)
            yield name, weight

    with pytest.raises(ApiError) as refused:
        sampler.update(counted())
    return [str(refused.value), *shards]


def test_a_hand_over_that_reaches_no_server_ends_in_every_trainer_with_the_cause(case: Case) -> None:
    def gone_at_last(path: str, body: dict[str, Any]) -> int | None:
        return 500 if path == "/pause" and len(case.servers[0].bodies(path)) > 1 else None

    case.servers[0].fault = gone_at_last
    first, other = side_by_side(hand_over_in_vain, [case.servers[0].url], case.folder)
    assert first == other
    assert "none is left" in first[0]
    assert first[1:] == ["bias", "table"]


def test_weights_that_a_killed_process_left_are_deleted(tmp_path: Path) -> None:
    left = tmp_path / "weights-abc" / "model-00000.safetensors"
    left.parent.mkdir()
    left.write_bytes(bytes(10))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    FolderHandOver(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# The recipe.


def test_servers_are_refused_beside_what_they_exclude(recipe_file: Path) -> None:
    servers = 'sampling.servers=["http://host:8000"]'
    assert load_recipe(recipe_file, [servers]).sampling.servers == ["http://host:8000"]
    with pytest.raises(ConfigError, match=r'servers: .* backend = "local"'):
        load_recipe(recipe_file, [servers, "sampling.backend=local"])
    with pytest.raises(ConfigError, match=r"sampling.servers: .*student.lora_rank = 4"):
        load_recipe(recipe_file, [servers, "student.lora_rank=4"])
    other = ["discriminator.model=other", "discriminator.reads=text"]
    assert load_recipe(recipe_file, [servers, *other]).discriminator.model == "other"
    with pytest.raises(ConfigError, match=r"discriminator.lm_steps = 9 trains and samples 'other'"):
        load_recipe(recipe_file, [servers, *other, "discriminator.lm_steps=9"])
    with pytest.raises(ConfigError, match=r"servers.* give an address as http://host:8000"):
        load_recipe(recipe_file, ['sampling.servers=["host:8000"]'])


# With vLLM.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random Llama that vLLM can serve, whose output has weights of its own."""
    return wide_llama(tmp_path_factory.mktemp("llama"), tiny_model, is_tied=False)


@contextmanager
def served(python: str, model: Path, log: Path) -> Iterator[str]:
    """A vLLM server of a model folder, as docs/scaling.md starts one, on a CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    command += ["--logprobs-mode", "processed_logprobs", "--enforce-eager", "--max-num-seqs", "16"]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | settings)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text(encoding="utf-8")[-6000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"no server after 300 s: {log.read_text(encoding='utf-8')[-6000:]}")


def following(model: PreTrainedModel, tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
    """The model's log-probabilities of each token after the first."""
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    logprobs: list[float] = (
        torch.log_softmax(logits / temperature, -1).gather(-1, ids[1:, None])[:, 0].tolist()
    )
    return logprobs


def move(model: PreTrainedModel, seed: int) -> None:
    """Change every weight, as a step of training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.abs().mean() * noise)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_real_server_samples_from_the_weights_it_is_handed(llama: Path, tmp_path: Path) -> None:
    python = os.environ.get("GADFLY_VLLM_PYTHON") or install(tmp_path / "venv")
    model, _ = load_language_model(str(llama), "float32")
    ends = frozenset(range(17, 33))
    with served(python, llama, tmp_path / "server.log") as url:
        sampler = VllmServers(
            [url],
            ends,
            canary=Canary(lambda tokens: following(model, tokens)),
            vocabulary_size=259,
            folder=tmp_path / "weights",
            max_tokens=120,
            max_parallel_responses=16,
            timeout_seconds=120.0,
        )
        requests = [Request(tuple(range(40, 60 + 9 * number)), 4, f"stream {number}") for number in range(3)]
        for seed in (1, 2):
            move(model, seed)
            sampler.update((name, value) for name, value in model.named_parameters())
            answers = sampler.sample(requests, temperature=0.8, max_response_tokens=16)
            for request, group in zip(requests, answers, strict=True):
                for sample in group:
                    row = following(model, [*request.prompt_tokens, *sample.tokens], 0.8)
                    assert sample.logprobs == pytest.approx(row[-len(sample.tokens) :], abs=1e-3)
                    assert sample.finished == (sample.tokens[-1] in ends)
                    assert not ends & set(sample.tokens[:-1])
            # The same seeds bring the same responses, whatever is drawn beside them.
            assert sampler.sample(requests[:1], temperature=0.8, max_response_tokens=16) == answers[:1]
        stale = {name: value.detach().clone() for name, value in model.named_parameters()}
        move(model, seed=3)
        with pytest.raises(AlarmError, match=f"{url} gives .* nats from the student's"):
            sampler.update(stale.items())
        sampler.update((name, value) for name, value in model.named_parameters())
