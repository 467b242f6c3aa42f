"""Collecting through the batch endpoint: nothing is submitted or paid twice, whatever happens."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, BatchPlan, Fault, FaultServer

from gadfly.api.batch_book import BOOK_FILE
from gadfly.api.batch_rows import BatchRows
from gadfly.api.chat_answer import RequestFailed
from gadfly.api.chat_api import ChatApi
from gadfly.api.chat_request import ChatRequest
from gadfly.errors import ApiError, GadflyError, RunFolderError, UserError
from gadfly.recipe_file import load_recipe
from gadfly.records import Message
from gadfly.stages.collect import collect, estimate, trial
from gadfly.stages.run import open_run

SOURCE = Path(__file__).resolve().parents[1] / "src"
KEY = "sk-test-0123456789abcdef"
# Tokens that a question of these tests is held to use at most.
BOUND = ChatRequest("gpt-4o", (Message("user", "say 0"),), {"max_tokens": 20}).token_bound.total
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    logger = logging.getLogger("gadfly")
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(logging.NOTSET)


class Bench:
    """A recipe in a folder of its own, and what its run folder holds."""

    def __init__(self, folder: Path):
        self.recipe = folder / "recipe.toml"
        self.run_folder = folder / "run"

    def write(self, base_url: str, *, prompts: int = 6, more: str = "") -> None:
        rows = [{"id": f"p{number}", "prompt": f"say {number}"} for number in range(prompts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.recipe.parent / "prompts.jsonl").write_text(lines, encoding="utf-8")
        self.recipe.write_text(
            f"""
name = "b"
run_folder = "run"
[data]
prompts = "prompts.jsonl"
[student]
model = "student"
[teacher]
base_url = "{base_url}"
model = "gpt-4o"
api_key_env = "TEACHER_KEY"
max_response_tokens = 20
batch = true
batch_poll_seconds = 0.02
max_attempts = 2
{more}
""",
            encoding="utf-8",
        )

    def collect(self, *overrides: str) -> None:
        with open_run(load_recipe(self.recipe, overrides)) as run:
            collect(run)

    def command(self) -> list[str]:
        return [sys.executable, "-W", "error", "-m", "gadfly", "collect", str(self.recipe)]

    def start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        return subprocess.Popen(self.command(), stderr=subprocess.PIPE, text=True, env=environment)

    def start_and_kill(self, reached: threading.Event) -> None:
        """Collect in a process of its own, and kill it where the server has it wait."""
        with self.start() as process:
            assert reached.wait(60)
            process.kill()

    @property
    def rows(self) -> Rows:
        path = self.run_folder / "teacher.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    @property
    def responses(self) -> dict[str, str]:
        return {row["id"]: row["response"] for row in self.rows}

    @property
    def open_batches(self) -> Rows:
        return list(json.loads((self.run_folder / BOOK_FILE).read_text(encoding="utf-8"))["batches"])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def created(server: FaultServer) -> Rows:
    """The batches at the provider, oldest first."""
    request = urllib.request.Request(
        f"{server.base_url}/batches?limit=1000", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        return list(reversed(json.load(reply)["data"]))


def sizes(server: FaultServer) -> list[int]:
    return [batch["request_counts"]["total"] for batch in created(server)]


def assert_each_is_paid_once(server: FaultServer, bench: Bench, num_questions: int) -> None:
    assert sorted(server.ledger.paid.values()) == [1] * num_questions
    assert len({row["key"] for row in bench.rows}) == len(bench.rows) == num_questions


def all_are_answered(bench: Bench, num_prompts: int = 6) -> bool:
    return bench.responses == {f"p{n}": f"answer to say {n}" for n in range(num_prompts)}


# ------------------------------------------------------------------------------------------ life cycle


def test_answers_come_home_whatever_their_order(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with FaultServer(key=KEY) as server:
        bench.write(server.base_url)
        bench.collect()
        assert all_are_answered(bench)
        assert [row["id"] for row in bench.rows] == [f"p{n}" for n in reversed(range(6))]
        assert len(created(server)) == 1
    assert not server.ledger.seen
    assert_each_is_paid_once(server, bench, 6)
    assert bench.open_batches == []
    assert [path.name for path in (bench.run_folder / "collect").iterdir()] == ["batches.json"]
    assert "collect: batch_1 submitted, 6 questions" in caplog.text
    assert "collect 0/6  waiting for batch_1 (in_progress)  for 0:00 h" in caplog.text


def test_rows_are_those_of_asking_one_by_one(bench: Bench, tmp_path: Path) -> None:
    one_by_one = Bench(tmp_path / "other")
    one_by_one.recipe.parent.mkdir()
    more = "temperature = 0.5\nsystem_prompt = 'Be brief.'\nextra_body = { seed = 1 }\nsamples_per_prompt = 2"
    with FaultServer() as server:
        for each in (bench, one_by_one):
            each.write(server.base_url, more=more)
        bench.collect()
        one_by_one.collect("teacher.batch=false")
    assert server.ledger.paid == dict.fromkeys(server.ledger.paid, 4), "the same bodies, 2 samples each"
    left_out = ("time", "request_id")
    rows, others = (
        sorted(({k: v for k, v in row.items() if k not in left_out} for row in each.rows), key=str)
        for each in (bench, one_by_one)
    )
    assert rows == others
    assert len(rows) == 12


def test_done_is_done(bench: Bench) -> None:
    with FaultServer() as server:
        bench.write(server.base_url)
        bench.collect()
        bench.collect()
        assert len(created(server)) == 1
    assert_each_is_paid_once(server, bench, 6)


def test_a_trial_asks_one_by_one_and_the_rest_is_a_batch(bench: Bench) -> None:
    with FaultServer() as server:
        bench.write(server.base_url, prompts=25)
        with open_run(load_recipe(bench.recipe)) as run:
            report = trial(run)
        assert "> say" in report
        assert report.endswith("the trial was asked one by one, at the price of single requests")
        assert (server.ledger.seen.total(), sizes(server)) == (20, [])
        bench.collect()
        assert sizes(server) == [5]
    assert_each_is_paid_once(server, bench, 25)


def test_what_an_open_batch_holds_is_neither_asked_by_a_trial_nor_counted_by_a_dry_run(bench: Bench) -> None:
    faults, reached = hold("GET /v1/batches/{id}")
    with FaultServer(route_faults=faults) as server:
        bench.write(server.base_url)
        bench.start_and_kill(reached)
        with open_run(load_recipe(bench.recipe)) as run:
            report = estimate(run)
            with pytest.raises(UserError, match=r"and run `gadfly collect` to get their answers"):
                trial(run)
        assert report == (
            "6 questions to gpt-4o, 0 answered already, 6 in a batch at the provider\n"
            "to ask, if every answer reaches the cap: about 0 tokens of prompts, 0 of answers: "
            "no price given (teacher.price)"
        )
        bench.collect()
    assert_each_is_paid_once(server, bench, 6)


def test_rows_of_any_shape_are_failures_of_their_questions(bench: Bench) -> None:
    bench.write("http://127.0.0.1:9/v1")
    rows = BatchRows(ChatApi(load_recipe(bench.recipe).teacher, "teacher"))
    for row in (
        {"response": "text"},
        {"response": {"status_code": "200", "body": {}}},
        {"response": {"status_code": 200, "body": []}},
        {"response": {"status_code": 400, "body": {"error": "text"}}},
        {"error": ["text"]},
    ):
        with pytest.raises(RequestFailed):
            rows.answer(row, 1, "max_tokens")


def test_a_batch_that_repeats_the_key_is_kept_without_it(bench: Bench) -> None:
    with FaultServer(answer=lambda _: f"you sent {KEY}", key=KEY) as server:
        bench.write(server.base_url)
        bench.collect()
    assert set(bench.responses.values()) == {"you sent …"}


def test_a_dry_run_asks_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    with FaultServer() as server:
        bench.write(server.base_url)
        with open_run(load_recipe(bench.recipe)) as run:
            assert "6 questions" in estimate(run)
        assert created(server) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_batch_holds_fifty_thousand(bench: Bench) -> None:
    with FaultServer() as server:
        bench.write(server.base_url, prompts=50_001)
        bench.collect()
        assert sizes(server) == [50_000, 1]
    assert_each_is_paid_once(server, bench, 50_001)


# ------------------------------------------------------------------------------------------- no answer


def test_what_the_server_failed_at_is_submitted_again(bench: Bench) -> None:
    plan = BatchPlan(faults=[None, Fault("server_error"), Fault("rate_limit"), Fault("empty_choices")])
    with FaultServer(batches=[plan]) as server:
        bench.write(server.base_url)
        bench.collect()
        assert sizes(server) == [6, 3]
    assert all_are_answered(bench)
    assert sorted(row["attempts"] for row in bench.rows) == [1, 1, 1, 2, 2, 2]


def test_what_is_turned_down_is_kept_as_rejected_and_never_asked_again(bench: Bench) -> None:
    with FaultServer(batches=[BatchPlan(faults=[Fault("context_length")])]) as server:
        bench.write(server.base_url)
        bench.collect()
        bench.collect()
        assert sizes(server) == [6]
    (rejected,) = [row for row in bench.rows if row.get("mark")]
    assert (rejected["id"], rejected["mark"]) == ("p0", "rejected")
    assert "maximum context length" in rejected["detail"]


def test_a_question_is_submitted_three_times_at_most(bench: Bench) -> None:
    failing = BatchPlan(faults=[Fault("server_error")] * 2)
    with FaultServer(batches=[failing] * 3) as server:
        bench.write(server.base_url)
        with pytest.raises(
            ApiError, match=r"2 questions failed \(2 server-error; the last: 500: .*\); 4 of 6 .* ask again"
        ):
            bench.collect()
        assert sizes(server) == [6, 2, 2]
        bench.collect()
        assert sizes(server) == [6, 2, 2, 2]
    assert all_are_answered(bench)


def test_marked_answers_are_kept_with_their_marks(bench: Bench) -> None:
    faults = [Fault("length"), Fault("refusal"), Fault("null_content"), Fault("content_filter")]
    with FaultServer(batches=[BatchPlan(faults=faults)]) as server:
        bench.write(server.base_url)
        bench.collect()
    marks = {row["id"]: row["mark"] for row in bench.rows if row["mark"]}
    assert marks == {"p0": "cut", "p1": "refusal", "p2": "empty", "p3": "content-filter"}
    assert_each_is_paid_once(server, bench, 6)


def test_where_everything_is_turned_down_nothing_is_kept(bench: Bench) -> None:
    with FaultServer(batches=[BatchPlan(faults=[Fault("bad_request")] * 6)]) as server:
        bench.write(server.base_url)
        with pytest.raises(ApiError, match="every question is turned down: 400: Invalid value") as error:
            bench.collect()
        assert "0 of 6 answers" in str(error.value)
        bench.collect()
    assert all_are_answered(bench)


def test_a_server_that_wants_max_completion_tokens_gets_them(bench: Bench) -> None:
    plan = BatchPlan(faults=[Fault("wants_max_completion_tokens")] * 6)
    with FaultServer(batches=[plan, plan]) as server:
        bench.write(server.base_url)
        bench.collect()
        assert sizes(server) == [6, 6]
    assert all("max_completion_tokens" in body for body in server.ledger.paid)
    assert_each_is_paid_once(server, bench, 6)


def test_an_expired_batch_keeps_its_answers_and_the_rest_is_submitted_again(bench: Bench) -> None:
    with FaultServer(batches=[BatchPlan(ends="expired", done=0.5)]) as server:
        bench.write(server.base_url)
        bench.collect()
        assert sizes(server) == [6, 3]
    assert all_are_answered(bench)
    assert_each_is_paid_once(server, bench, 6)


def test_batches_that_always_expire_are_an_error(bench: Bench) -> None:
    with FaultServer(batches=[BatchPlan(ends="expired", done=0)] * 3) as server:
        bench.write(server.base_url)
        with pytest.raises(ApiError, match=r"6 questions failed \(6 expired; the last: batch_expired: .*\)"):
            bench.collect()
        assert sizes(server) == [6, 6, 6]
    assert bench.open_batches == []


def test_a_cancelled_batch_is_submitted_again(bench: Bench) -> None:
    def cancel_first(number: int, _: object) -> None:
        if number == 0:
            address = f"{server.base_url}/batches/batch_1/cancel"
            threading.Thread(target=lambda: urllib.request.urlopen(address, b"", timeout=10).close()).start()

    plans = [BatchPlan(polls=1000, done=0.5)]
    with FaultServer(batches=plans, route_faults={"GET /v1/batches/{id}": cancel_first}) as server:
        bench.write(server.base_url)
        bench.collect()
        assert [batch["status"] for batch in created(server)] == ["cancelled", "completed"]
    assert_each_is_paid_once(server, bench, 6)


def test_a_batch_that_is_refused_tells_the_servers_reason(bench: Bench) -> None:
    with FaultServer(batches=[BatchPlan(ends="failed")]) as server:
        bench.write(server.base_url)
        with pytest.raises(
            ApiError, match="batch_1: the batch is refused: duplicate custom_id, line 1 of it"
        ):
            bench.collect()
        assert bench.open_batches == []
        bench.collect()
    assert_each_is_paid_once(server, bench, 6)


def test_a_queue_that_is_too_short_for_a_batch_gets_halves(bench: Bench) -> None:
    over = BatchPlan(ends="failed", code="token_limit_exceeded")
    with FaultServer(batches=[over, over]) as server:
        bench.write(server.base_url, prompts=8)
        bench.collect()
        counts = [batch["request_counts"]["completed"] for batch in created(server)]
        assert counts == [0, 0, 2, 2, 2, 2]
    assert_each_is_paid_once(server, bench, 8)
    assert {row["attempts"] for row in bench.rows} == {1}


# ------------------------------------------------------------------------------------- broken calls


@pytest.mark.parametrize("kind", ["reset", "cut", "malformed", "html"])
def test_a_batch_whose_creation_was_not_heard_of_is_not_created_again(bench: Bench, kind: Any) -> None:
    with FaultServer(key=KEY, route_faults={"POST /v1/batches": [Fault(kind)]}) as server:
        bench.write(server.base_url)
        bench.collect()
        assert len(created(server)) == 1
    assert_each_is_paid_once(server, bench, 6)


def test_every_call_may_fail_once(bench: Bench) -> None:
    first = {
        "POST /v1/files": [Fault("server_error", status=503), Fault("cut")],
        "POST /v1/batches": [Fault("rate_limit", seconds=0.1), Fault("reset")],
        "GET /v1/batches": [Fault("server_error")],
        "GET /v1/batches/{id}": [Fault("html"), Fault("reset"), Fault("rate_limit")],
        "GET /v1/files/{id}/content": [Fault("cut"), Fault("malformed"), Fault("html")],
    }
    with FaultServer(route_faults=first) as server:
        bench.write(server.base_url, more="timeout_seconds = 5")
        bench.collect("teacher.max_attempts=9")
        assert len(created(server)) == 1
    assert all_are_answered(bench)
    assert_each_is_paid_once(server, bench, 6)


def test_answers_that_a_file_lacks_are_not_paid_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(faults=[], batches=[BatchPlan(polls=1)]) as server:
        bench.write(server.base_url)
        with monkeypatch.context() as patched:
            whole = server._desk.content

            def cut(file_id: str) -> bytes:
                content = whole(file_id)
                # The upload is file-1, what was answered file-2.
                return content if file_id == "file-1" else b"".join(content.splitlines(keepends=True)[:4])

            patched.setattr(server._desk, "content", cut)
            with pytest.raises(ApiError, match=r"batch_1: its file lacks 2 of 6 answers; the same command"):
                bench.collect()
            assert len(bench.rows) == 4
        bench.collect()
        assert len(created(server)) == 1
    assert all_are_answered(bench)
    assert_each_is_paid_once(server, bench, 6)


def test_when_the_network_stays_away_the_batch_goes_on_and_is_picked_up(bench: Bench) -> None:
    def away(number: int, _: object) -> Fault | None:
        return Fault("reset") if 0 < number < 5 else None

    with FaultServer(batches=[BatchPlan(polls=100)], route_faults={"GET /v1/batches/{id}": away}) as server:
        bench.write(server.base_url, more="give_up_seconds = 0.4")
        message = (
            r"^teacher 'gpt-4o' at http://127.*: waiting for batch_1: given up after \d+ s: cut-off: .*; "
            r"1 batch goes on at the provider; 0 of 6 answers are kept in .*run the same command to go on\.$"
        )
        with pytest.raises(ApiError, match=message):
            bench.collect()
        (noted,) = bench.open_batches
        assert noted["batch_id"] == "batch_1"
        bench.collect("teacher.give_up_seconds=30", "teacher.max_attempts=9")
        assert len(created(server)) == 1
    assert_each_is_paid_once(server, bench, 6)


def test_an_address_where_nobody_is_is_told_soon(bench: Bench) -> None:
    bench.write("http://127.0.0.1:9/v1")
    with pytest.raises(ApiError, match=r"uploading a batch: given up after \d s: unreachable: .*; 0 of 6"):
        bench.collect()


def test_a_server_without_batches_is_told(bench: Bench) -> None:
    with FaultServer(route_faults={"POST /v1/files": [Fault("unknown_model")]}) as server:
        bench.write(server.base_url)
        with pytest.raises(ApiError, match=r"no files for batches there; teacher\.batch = false asks"):
            bench.collect()


def test_a_wrong_key_is_told_without_it(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    with FaultServer(key="another") as server:
        bench.write(server.base_url)
        done = bench.start()
        _, stderr = done.communicate(timeout=60)
    assert done.returncode == 3
    assert "the key in TEACHER_KEY is wrong or expired" in stderr
    seen = stderr.encode() + b"".join(p.read_bytes() for p in bench.run_folder.rglob("*") if p.is_file())
    assert KEY.encode() not in seen
    assert KEY[4:].encode() not in seen


# ---------------------------------------------------------------------------------------------- budget


def test_a_budget_of_requests_is_never_crossed(bench: Bench) -> None:
    with FaultServer() as server:
        bench.write(server.base_url, more="budget = { requests = 4 }")
        message = r"^teacher\.budget is spent; 4 of 6 answers are kept in .*Raise it and run the same command"
        with pytest.raises(UserError, match=message):
            bench.collect()
        with pytest.raises(UserError, match=message):
            bench.collect()
        assert sizes(server) == [4]
        bench.collect("teacher.budget.requests=6")
        assert sizes(server) == [4, 2]
    assert_each_is_paid_once(server, bench, 6)


def test_what_cheap_answers_leave_of_a_budget_is_used(bench: Bench) -> None:
    """Three answers use less than one was held to use at most, so the other three fit after them."""
    with FaultServer() as server:
        bench.write(server.base_url, more=f"budget = {{ tokens = {3 * BOUND + BOUND // 2} }}")
        bench.collect()
        assert sizes(server) == [3, 3]
    assert_each_is_paid_once(server, bench, 6)


def test_dollars_in_an_open_batch_count_after_a_restart(bench: Bench) -> None:
    def away(number: int, _: object) -> Fault | None:
        return Fault("server_error") if 0 < number < 4 else None

    dollars = (3 * BOUND + BOUND // 2) / 100
    more = (
        f"price = {{ input = 1e4, output = 1e4 }}\nbudget = {{ dollars = {dollars} }}\ngive_up_seconds = 0.4"
    )
    with FaultServer(batches=[BatchPlan(polls=3)], route_faults={"GET /v1/batches/{id}": away}) as server:
        bench.write(server.base_url, more=more)
        with pytest.raises(ApiError):
            bench.collect()
        assert bench.open_batches[0]["questions"] == 3
        bench.collect("teacher.give_up_seconds=30", "teacher.max_attempts=9")
        assert sizes(server) == [3, 3]
    assert_each_is_paid_once(server, bench, 6)


# ------------------------------------------------------------------------------------- stop and resume


def hold(route: str) -> tuple[dict[str, Callable[[int, Any], Fault | None]], threading.Event]:
    """A fault plan that keeps the first reply of a route back, and tells when it does."""
    reached = threading.Event()

    def plan(number: int, _: object) -> Fault | None:
        if number:
            return None
        reached.set()
        return Fault("slow", seconds=60)

    return {route: plan}, reached


@pytest.mark.parametrize(
    "route",
    ["POST /v1/files", "POST /v1/batches", "GET /v1/batches/{id}", "GET /v1/files/{id}/content"],
)
def test_killed_before_a_reply_comes_nothing_is_submitted_twice(bench: Bench, route: str) -> None:
    faults, reached = hold(route)
    with FaultServer(key=KEY, route_faults=faults) as server:
        bench.write(server.base_url)
        with bench.start() as process:
            assert reached.wait(60)
            time.sleep(0.1)
            process.kill()
        bench.collect()
        assert len(created(server)) == 1
    assert_each_is_paid_once(server, bench, 6)
    assert all_are_answered(bench)


def killed_at_random(bench: Bench, kills: int, seed: int) -> None:
    generator = random.Random(seed)
    plans = [BatchPlan(polls=5 * kills // 3, ends="expired", done=0.4)] * 2
    routes = ("POST /v1/files", "POST /v1/batches", "GET /v1/batches/{id}", "GET /v1/files/{id}/content")
    slow = {route: lambda number, _: Fault("slow", seconds=0.05) for route in routes}
    with FaultServer(batches=plans, route_faults=slow) as server:
        bench.write(server.base_url, prompts=200)
        alive = 0
        for _ in range(kills):
            with bench.start() as process:
                begun = sum(server._seen.values())
                while process.poll() is None and sum(server._seen.values()) == begun:
                    time.sleep(0.005)
                time.sleep(generator.uniform(0, 0.3))
                alive += process.poll() is None
                process.kill()
        bench.collect()
        assert [batch["request_counts"]["completed"] for batch in created(server)] == [80, 48, 72]
    assert alive > kills / 2, "most were killed at work"
    assert_each_is_paid_once(server, bench, 200)
    assert all_are_answered(bench, 200)


def test_killed_three_times_every_question_is_paid_once(bench: Bench) -> None:
    killed_at_random(bench, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_killed_ten_times_every_question_is_paid_once(bench: Bench, seed: int) -> None:
    killed_at_random(bench, kills=10, seed=seed)


def test_ctrl_c_leaves_the_batch_to_the_same_command(bench: Bench) -> None:
    reached = threading.Event()

    def plan(number: int, _: object) -> None:
        if number == 3:
            reached.set()

    with FaultServer(batches=[BatchPlan(polls=1000)], route_faults={"GET /v1/batches/{id}": plan}) as server:
        bench.write(server.base_url)
        with bench.start() as process:
            assert reached.wait(60)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert stderr.endswith("stopped; run the same command to go on\n")
        assert "Traceback" not in stderr
        assert bench.open_batches[0]["batch_id"] == "batch_1"
        assert len(created(server)) == 1


def test_what_other_settings_asked_for_is_kept_too(bench: Bench) -> None:
    faults, reached = hold("GET /v1/batches/{id}")
    with FaultServer(route_faults=faults) as server:
        bench.write(server.base_url)
        bench.start_and_kill(reached)
        bench.collect("teacher.temperature=0.5")
        assert len(bench.rows) == 12
        assert {row["parameters"].get("temperature") for row in bench.rows} == {None, 0.5}
        bench.collect()
        assert sizes(server) == [6, 6]
    assert_each_is_paid_once(server, bench, 12)


def test_a_batch_of_other_questions_is_not_waited_for(bench: Bench) -> None:
    faults, reached = hold("GET /v1/batches/{id}")
    with FaultServer(batches=[BatchPlan(polls=6)], route_faults=faults) as server:
        bench.write(server.base_url)
        bench.start_and_kill(reached)
        bench.collect("teacher.temperature=0.5")
        bench.collect("teacher.temperature=0.5")
        assert len(bench.rows) == 6
        assert len(bench.open_batches) == 1
        bench.collect()
        assert len(created(server)) == 2
    assert_each_is_paid_once(server, bench, 12)


def test_an_open_batch_is_not_paid_again_one_by_one(bench: Bench) -> None:
    faults, reached = hold("GET /v1/batches/{id}")
    with FaultServer(route_faults=faults) as server:
        bench.write(server.base_url)
        bench.start_and_kill(reached)
        with pytest.raises(
            UserError, match=r"6 questions are in a batch at the provider; set teacher\.batch"
        ):
            bench.collect("teacher.batch=false")
        bench.collect()
        bench.collect("teacher.batch=false")
    assert not server.ledger.seen
    assert_each_is_paid_once(server, bench, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"batches": [{"name": "a"}]}', "not as it was written"),
        ('{"batches": [3]}', "not as it was written"),
        (
            '{"batches": [{"name": "a", "questions": 3, "cap_name": "max_tokens", "noted_at": 0.5}]}',
            r"0 of 3 questions are in collect/batch-a\.jsonl",
        ),
        ("{", "not a JSON object"),
    ],
)
def test_a_damaged_list_of_batches_is_told(bench: Bench, content: str, message: str) -> None:
    bench.write("http://127.0.0.1:9/v1")
    path = bench.run_folder / BOOK_FILE
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RunFolderError, match=message):
        bench.collect()


def test_a_batch_that_is_gone_is_told(bench: Bench) -> None:
    answer: Answer = lambda body: "ok"  # noqa: E731
    faults, reached = hold("GET /v1/batches/{id}")
    with FaultServer(answer=answer, route_faults=faults) as server:
        bench.write(server.base_url)
        bench.start_and_kill(reached)
    with FaultServer() as other:
        bench.write(other.base_url)
        with pytest.raises(GadflyError, match=r"no batch_1 there; if it is gone, delete collect/batches"):
            bench.collect()
