"""Collecting a teacher's answers through the command itself, from a provider that fails to order."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from collecting import KEY, SOURCE, Desk
from fault_server import Fault, FaultServer, Ledger, ServerProcess, fault_process, settled_ledger

from gadfly.config import Recipe
from gadfly.data.collected import collected
from gadfly.data.dataset import load_rows
from gadfly.errors import DataError
from gadfly.recipe_file import load_recipe
from gadfly.run_folder import RunFolder
from gadfly.stages.collect import collect
from gadfly.stages.run import open_run

EVERY_FAULT = [
    Fault("server_error"),
    Fault("server_error", status=503),
    Fault("cut"),
    Fault("reset"),
    Fault("malformed"),
    Fault("html"),
    Fault("empty_choices"),
    Fault("rate_limit", seconds=0.2),
    Fault("rate_limit", seconds=0.2, as_date=True),
    Fault("rate_limit"),
    Fault("rate_limit", seconds=0.2, reset=0.2),
    Fault("slow", seconds=0.2),
    Fault("wants_max_completion_tokens"),
]


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def always(fault: Fault) -> Callable[[int, Any], Fault]:
    return lambda number, body: fault


def spelt(turns: list[dict[str, str]]) -> str:
    return json.dumps(turns, sort_keys=True)


def for_text(text: str, fault: Fault) -> Callable[[int, dict[str, Any]], Fault | None]:
    """The fault for every request with this question."""
    return lambda number, body: fault if body["messages"][-1]["content"] == text else None


def paid_once(ledger: Ledger, count: int) -> None:
    assert len(ledger.paid) == ledger.paid.total() == count


def dataset_of(desk: Desk) -> Any:
    found = collected(load_recipe(desk.recipe), RunFolder(desk.run))
    assert found is not None
    return found


# -------------------------------------------------------------------------------------------- answers


def test_every_prompt_is_answered_once_and_all_that_was_said_is_kept(desk: Desk) -> None:
    with FaultServer(key=KEY, latency=0.02) as server:
        desk.write(server.base_url, 12, "temperature = 0.5\nmax_response_tokens = 9\nconcurrency = 5")
        said = desk.collect()
        ledger = server.ledger
        assert ledger.max_in_flight == 5
        again = desk.collect(key="")
    assert said.code == again.code == 0
    assert said.out == f"collect: done, in {desk.run}\n"
    assert "done already, 12 answers" in again.err
    paid_once(ledger, 12)
    assert ledger.seen.total() == 12
    row = desk.by_id["p3"]
    assert row.pop("request_id").startswith("req_")
    assert len(row.pop("key")) == 64
    assert row.pop("time").startswith("20")
    assert row == {
        "id": "p3",
        "messages": [{"role": "user", "content": "question 3"}],
        "response": "answer to question 3",
        "finish_reason": "stop",
        "mark": None,
        "teacher": "m",
        "asked_model": "m",
        "parameters": {"temperature": 0.5, "max_tokens": 9},
        "sample_index": 0,
        "usage": {"prompt_tokens": 2, "completion_tokens": 4},
        "charged": {"prompt_tokens": 2, "completion_tokens": 4},
        "attempts": 1,
    }
    assert desk.summary == {
        "answers": 12,
        "marked": {},
        "teachers": {"m": 12},
        "requests": 12,
        "prompt_tokens": 24,
        "completion_tokens": 48,
        "dollars": None,
    }


def test_prompts_of_every_format_are_asked_whole_and_the_system_prompt_is_the_teachers_alone(
    desk: Desk,
) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
    turns = [user, {"role": "assistant", "content": "I."}, {"role": "user", "content": "Why?"}]
    rows = [
        {"id": "text", "prompt": "What?"},
        {"id": "list", "prompt": [user]},
        {"id": "messages", "messages": [system, *turns]},
        {"id": "content", "content": [system, user], "teacher_response": "not read"},
    ]
    with FaultServer() as server:
        desk.write(server.base_url, rows, 'system_prompt = "Rhyme."')
        assert desk.collect().code == 0
        asked = [json.loads(body)["messages"] for body in server.ledger.paid]
    rhyme, both = (
        {"role": "system", "content": "Rhyme."},
        {"role": "system", "content": "Rhyme.\n\nBe brief."},
    )
    wanted = [[rhyme, {"role": "user", "content": "What?"}], [rhyme, user], [both, *turns], [both, user]]
    assert sorted(map(spelt, asked)) == sorted(map(spelt, wanted))
    found = {row.id: row for row in dataset_of(desk).rows}
    assert [turn.content for turn in found["messages"].messages] == ["Be brief.", "Who?", "I.", "Why?"]
    assert found["text"].prompt == "What?"
    assert found["content"].responses[0].text == "answer to Who?"


def test_samples_are_requests_and_make_one_prompt_with_responses_in_their_order(desk: Desk) -> None:
    numbers = iter(range(1000))
    with FaultServer(answer=lambda body: f"answer {next(numbers)}") as server:
        desk.write(server.base_url, 8, "samples_per_prompt = 3\ntemperature = 1.0\nconcurrency = 3")
        assert desk.collect().code == 0
        # The same body three times, each paid.
        assert sorted(server.ledger.paid.values()) == [3] * 8
    rows = desk.rows
    assert Counter(row["sample_index"] for row in rows) == {0: 8, 1: 8, 2: 8}
    data = dataset_of(desk)
    texts = {(row["id"], row["sample_index"]): row["response"] for row in rows}
    assert [row.id for row in data.rows] == [f"p{n}" for n in range(8)]
    assert all(
        [answer.text for answer in row.responses] == [texts[row.id, index] for index in range(3)]
        for row in data.rows
    )
    lines = desk.file.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    desk.file.write_text("".join(lines))
    assert dataset_of(desk).fingerprint == data.fingerprint
    # As a file of its own, samples of a prompt make one row too.
    alone = load_rows(str(desk.file), needs_response=True)
    assert sorted(len(row.responses) for row in alone.rows) == [3] * 8


def test_an_answer_outlives_the_id_its_prompt_had(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url, [{"id": "old", "prompt": "What?"}], "temperature = 1.0")
        assert desk.collect().code == 0
        both = "temperature = 1.0\nsamples_per_prompt = 2"
        desk.write(server.base_url, [{"id": "new", "prompt": "What?"}], both)
        assert desk.collect().code == 0
        assert server.ledger.seen.total() == 2
    (row,) = dataset_of(desk).rows
    assert (row.id, len(row.responses)) == ("new", 2)


def test_answers_that_are_all_to_other_settings_are_told_as_such(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url, 6)
        assert desk.collect().code == 0
        desk.write(server.base_url, 6, "temperature = 0.7")
        with pytest.raises(DataError, match="none of its 6 answers is to a question of this recipe"):
            dataset_of(desk)


def test_other_settings_are_other_answers_and_the_old_ones_are_there_when_they_return(desk: Desk) -> None:
    with FaultServer(answer=lambda body: f"at {body['temperature']}") as server:
        for temperature in ("0.5", "1.0", "0.5"):
            desk.write(server.base_url, 6, f"temperature = {temperature}")
            assert desk.collect().code == 0
            data = dataset_of(desk)
            assert {row.responses[0].text for row in data.rows} == {f"at {temperature}"}
            assert len(data.rows) == 6
        paid_once(server.ledger, 12)
    assert len(desk.rows) == 12


# ------------------------------------------------------------------------------- marks, and who answered

ODD = [
    Fault("null_content"),
    Fault("refusal"),
    Fault("length"),
    Fault("content_filter"),
    Fault("no_finish_reason"),
    Fault("other_model"),
]


def test_odd_answers_are_kept_marked_and_counted_and_not_trained_on(desk: Desk) -> None:
    with FaultServer(faults=ODD) as server:
        desk.write(server.base_url, 8, "concurrency = 1")
        said = desk.collect()
        paid_once(server.ledger, 8)
    assert said.code == 0
    found = desk.by_id
    marks = {name: row["mark"] for name, row in found.items() if row["mark"]}
    assert marks == {"p0": "empty", "p1": "refusal", "p2": "cut", "p3": "content-filter"}
    assert found["p1"]["response"] == "I cannot help with that."
    assert found["p4"]["finish_reason"] is None
    assert desk.summary["marked"] == {"empty": 1, "refusal": 1, "cut": 1, "content-filter": 1}
    assert desk.summary["teachers"] == {"m": 7, "another-model": 1}
    assert said.err.count("another-model") == 1
    assert "4 of 8 answers are marked: " in said.err
    assert {row.id for row in dataset_of(desk).rows} == {"p4", "p5", "p6", "p7"}
    assert all(row.responses[0].finished for row in dataset_of(desk).rows)
    assert dataset_of(desk).bad_by_reason() == dict.fromkeys(marks.values(), 1)


def test_cut_answers_and_refusals_can_be_let_in(desk: Desk) -> None:
    with FaultServer(faults=ODD) as server:
        desk.write(server.base_url, 8, 'concurrency = 1\ntrain_on = ["cut", "refusal"]')
        assert desk.collect().code == 0
    finished = {row.id: row.responses[0].finished for row in dataset_of(desk).rows}
    assert finished == {"p1": True, "p2": False, "p4": True, "p5": True, "p6": True, "p7": True}


# ---------------------------------------------------------------------------------------- passing faults


def test_all_passing_faults_at_once_lose_nothing_and_pay_nothing_twice(desk: Desk) -> None:
    faults = [*EVERY_FAULT, None, *reversed(EVERY_FAULT), None, *EVERY_FAULT]
    with FaultServer(faults=faults, key=KEY, latency=0.01) as server:
        desk.write(server.base_url, 40, "max_response_tokens = 20\nconcurrency = 50\nmax_attempts = 20")
        said = desk.collect()
        assert said.code == 0, said.err
        # The name of the cap is part of the body, so a prompt is paid under one of two.
        paid = Counter(json.loads(body)["messages"][0]["content"] for body in server.ledger.paid.elements())
        assert sorted(paid) == sorted(f"question {n}" for n in range(40))
        assert paid.total() == 40
        assert sum(row["attempts"] for row in desk.rows) == server.ledger.seen.total()
    assert len(desk.by_id) == 40
    assert "errors: " in said.err


def test_a_question_that_goes_on_failing_is_left_for_the_next_run(desk: Desk) -> None:
    fault = Fault("server_error")
    with FaultServer(faults=for_text("question 5", fault)) as server:
        desk.write(server.base_url, 12, "max_attempts = 2")
        said = desk.collect()
        assert said.code == 3
        assert (
            "collect: 1 questions failed (1 server-error; the last: 500: The server had an error" in said.err
        )
        assert f"11 of 12 answers are kept in {desk.file}. Run the same command to ask again." in said.error
        assert server.ledger.seen.total() == 13
    with FaultServer() as server:
        desk.write(server.base_url, 12, "max_attempts = 2")
        assert desk.collect().code == 0
        assert server.ledger.seen.total() == 1
    assert len(desk.by_id) == 12


def test_one_question_that_fails_first_does_not_stop_the_others(desk: Desk) -> None:
    fault = Fault("server_error")
    with FaultServer(faults=for_text("question 0", fault)) as server:
        desk.write(server.base_url, 12, "max_attempts = 1\nconcurrency = 1")
        assert desk.collect().code == 3
    assert len(desk.by_id) == 11


# ------------------------------------------------------------------------------------------ for good


@pytest.mark.parametrize(
    ("fault", "teacher", "message"),
    [
        (Fault("expired_key"), "", "the key in TEACHER_KEY is wrong or expired: 401: Incorrect API key"),
        (Fault("unknown_model"), "", "no model 'm' there"),
        (Fault("insufficient_quota"), "", "no credit left: 429: You exceeded your quota."),
        (Fault("low_balance"), "", "no credit left: 400: Your credit balance is too low"),
        (Fault("html"), "max_attempts = 2", "the server sent a web page instead of an answer; is base_url"),
        (Fault("bad_request"), "", "rejected: 400: Invalid value: 'temperature' must be at most 2."),
        (Fault("rate_limit", seconds=500), "", "asks to wait 500 s, more than give_up_seconds = 300"),
        (Fault("rate_limit"), "give_up_seconds = 0.5", "has refused everything for"),
        (Fault("server_error"), "max_attempts = 1", "server-error: 500"),
    ],
)
def test_what_no_question_gets_past_is_one_line_and_exit_3(
    desk: Desk, fault: Fault, teacher: str, message: str
) -> None:
    with FaultServer(faults=always(fault)) as server:
        desk.write(server.base_url, 30, teacher)
        said = desk.collect()
        assert server.ledger.seen.total() < 100
    assert said.code == 3
    assert said.error.startswith(f"teacher 'm' at {server.base_url}: ")
    assert message in said.error
    assert f"; 0 of 30 answers are kept in {desk.file}. Put it right and run the same command" in said.error
    assert said.out == ""
    assert not desk.rows


@pytest.mark.parametrize("kind", ["expired_key", "unknown_model", "insufficient_quota"])
def test_what_ends_it_in_mid_run_leaves_every_answer_in_flight_on_disk(desk: Desk, kind: Any) -> None:
    faults = lambda number, body: Fault(kind) if number == 15 else None  # noqa: E731
    with FaultServer(faults=faults, latency=0.1) as server:
        desk.write(server.base_url, 100, "concurrency = 10")
        said = desk.collect()
        ledger = server.ledger
        assert ledger.paid_undelivered.total() == 0
    assert said.code == 3
    assert len(desk.by_id) == ledger.paid.total() >= 15
    assert ledger.seen.total() <= 26
    assert f"{len(desk.rows)} of 100 answers are kept in {desk.file}" in said.error


def test_a_wrong_key_that_the_server_repeats_in_full_is_not_shown(desk: Desk) -> None:
    with FaultServer(key="another") as server:
        desk.write(server.base_url)
        said = desk.collect()
    assert said.code == 3
    assert "the key in TEACHER_KEY is wrong or expired: 401: Incorrect API key provided: …" in said.error


def test_an_answer_that_repeats_the_key_is_kept_without_it(desk: Desk) -> None:
    said = {"content": f"You sent {KEY}.", "model": KEY, "finish_reason": KEY}
    with FaultServer(answer=lambda _: said) as server:
        desk.write(server.base_url)
        # That no part of the key is anywhere is asserted by the desk.
        assert desk.collect().code == 0
    assert {row["response"] for row in desk.rows} == {"You sent …."}


def test_a_short_key_is_a_word_that_answers_may_hold(desk: Desk) -> None:
    with FaultServer(answer=lambda _: "EMPTY sets are sets") as server:
        desk.write(server.base_url, 1)
        with mock.patch.dict(os.environ, {"TEACHER_KEY": "EMPTY"}), open_run(load_recipe(desk.recipe)) as run:
            collect(run)
    assert [row["response"] for row in desk.rows] == ["EMPTY sets are sets"]


def test_a_server_that_is_not_there_is_one_line(desk: Desk) -> None:
    desk.write("http://127.0.0.1:9/v1", teacher="max_attempts = 2")
    said = desk.collect()
    assert said.code == 3
    assert "unreachable: ConnectError: All connection attempts failed; 0 of 12 answers" in said.error


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told_within_20_seconds(desk: Desk) -> None:
    desk.write("http://127.0.0.1:9/v1")
    began = time.monotonic()
    assert desk.collect().code == 3
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [0, 7])
def test_a_question_turned_down_is_kept_and_not_asked_again(desk: Desk, number: int) -> None:
    fault = Fault("context_length")
    with FaultServer(faults=for_text(f"question {number}", fault)) as server:
        desk.write(server.base_url, 12, "concurrency = 1")
        first, second = desk.collect(), desk.collect()
        assert server.ledger.seen.total() == 12
    assert first.code == second.code == 0
    row = desk.by_id[f"p{number}"]
    assert (row["mark"], row["response"]) == ("rejected", "")
    assert "maximum context length is 8192" in row["detail"]
    assert desk.summary["marked"] == {"rejected": 1}
    assert len(dataset_of(desk).rows) == 11


def test_where_everything_is_turned_down_from_some_answer_on_nothing_of_it_is_kept(desk: Desk) -> None:
    faults = lambda number, body: Fault("bad_request") if number >= 5 else None  # noqa: E731
    with FaultServer(faults=faults) as server:
        desk.write(server.base_url, 100, "concurrency = 4")
        said = desk.collect()
        assert server.ledger.seen.total() < 50
    assert said.code == 3
    assert "since its last answer it turns down everything, rejected: 400: Invalid value" in said.error
    assert len(desk.rows) == 5
    with FaultServer() as server:
        desk.write(server.base_url, 100, "concurrency = 4")
        assert desk.collect().code == 0
    assert {row["mark"] for row in desk.rows} == {None}
    assert len(desk.by_id) == 100


def test_questions_turned_down_before_any_answer_are_asked_again_once_others_are_answered(desk: Desk) -> None:
    with FaultServer(faults=always(Fault("bad_request"))) as server:
        desk.write(server.base_url, 2)
        said = desk.collect()
    assert said.code == 3
    assert "2 questions failed (2 rejected; the last: 400: Invalid value" in said.err
    assert not desk.rows


def test_all_in_flight_follow_when_the_cap_has_another_name(desk: Desk) -> None:
    fault = Fault("wants_max_completion_tokens")
    with FaultServer(faults=always(fault), latency=0.02) as server:
        desk.write(server.base_url, 30, "max_response_tokens = 9\nmax_attempts = 1")
        said = desk.collect()
        assert said.code == 0, said.err
        paid_once(server.ledger, 30)
        assert all('"max_completion_tokens":9' in body for body in server.ledger.paid)
        assert server.ledger.seen.total() == 46
    assert {row["parameters"]["max_tokens"] for row in desk.rows} == {9}


# -------------------------------------------------------------------------------------- pace and budget


def test_a_pace_told_by_headers_is_kept_to_with_few_refusals(desk: Desk) -> None:
    with FaultServer(requests_per_minute=1200, burst=20) as server:
        desk.write(server.base_url, 60, "concurrency = 50")
        began = time.monotonic()
        assert desk.collect().code == 0
        assert time.monotonic() - began < 10
        paid_once(server.ledger, 60)
        assert server.ledger.seen.total() <= 60 + 2 * 50


@pytest.mark.parametrize("num_faults", [0, 9])
def test_requests_never_exceed_their_budget_and_reach_it(desk: Desk, num_faults: int) -> None:
    faults = EVERY_FAULT[:num_faults]
    with FaultServer(faults=faults, latency=0.01) as server:
        desk.write(server.base_url, 60, "concurrency = 50\nbudget = { requests = 25 }")
        said = desk.collect()
        assert server.ledger.seen.total() == 25
        assert said.code == 2
        error = f"teacher.budget is spent; {25 - num_faults} of 60 answers are kept in {desk.file}. Raise it"
        assert error in said.error
        assert len(desk.rows) == 25 - num_faults
        before = sum(row["attempts"] for row in desk.rows)
        desk.write(server.base_url, 60, f"concurrency = 50\nbudget = {{ requests = {before + 10} }}")
        assert desk.collect().code == 2
        assert server.ledger.seen.total() == 35
        desk.write(server.base_url, 60, "concurrency = 50")
        assert desk.collect().code == 0
    assert len(desk.by_id) == 60


@pytest.mark.parametrize("kind", ["tokens", "dollars"])
@pytest.mark.parametrize("limit", [300, 1500])
def test_tokens_and_dollars_never_exceed_their_budget_and_reach_it(desk: Desk, kind: str, limit: int) -> None:
    prompts = [{"id": f"p{n}", "prompt": f"question {n} " + "why " * (n % 7)} for n in range(80)]
    faults = [Fault("cut"), None, Fault("reset"), Fault("malformed"), Fault("server_error")]
    # A dollar a token.
    teacher = (
        f"concurrency = 50\nmax_response_tokens = 40\nprice = {{ input = 1e6, output = 1e6 }}\n"
        f"budget = {{ {kind} = {limit} }}"
    )
    with FaultServer(faults=faults, latency=0.01, answer=lambda body: "word " * 20) as server:
        desk.write(server.base_url, prompts, teacher)
        said = desk.collect()
        again = desk.collect()
        ledger = server.ledger
    assert said.code == again.code == 2
    charged = sum(sum(row["charged"].values()) for row in desk.rows)
    used = sum(sum(row["usage"].values()) for row in desk.rows)
    assert used <= charged <= limit
    # What broke off may have been paid for: 22 tokens or so each.
    worthless = sum(entry.event in ("spoilt", "reset") for entry in ledger.entries)
    assert used + worthless * 29 <= limit
    # The shortest question takes 12 + 16 + 64 and its answer 40 at most: it would not have fitted.
    assert charged + 12 + 16 + 64 + 40 + 4 > limit or limit < 500


def test_a_budget_that_suffices_is_no_obstacle(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url, 20, "max_response_tokens = 9\nbudget = { requests = 20, tokens = 5000 }")
        assert desk.collect().code == 0


def test_answers_without_usage_count_at_their_bound_in_the_next_run_too(desk: Desk) -> None:
    with FaultServer(answer=lambda body: {"content": "yes", "usage": None}) as server:
        desk.write(server.base_url, 20, "max_response_tokens = 10\nbudget = { tokens = 1000 }")
        assert desk.collect().code == desk.collect().code == 2
        # A question has 10 or 11 bytes.
        assert server.ledger.seen.total() == 1000 // (10 + 16 + 64 + 10)


# ------------------------------------------------------------------------------ before and while asking


def test_a_dry_run_asks_nothing_and_needs_no_key(desk: Desk) -> None:
    with FaultServer() as server:
        teacher = "price = { input = 100, output = 1000 }\nmax_response_tokens = 50"
        desk.write(server.base_url, 100, teacher)
        said = desk.collect("--dry-run", key="")
        assert not server.ledger.entries
    assert said.code == 0
    # 1,090 characters are 272 tokens.
    cost = "$5.03"
    assert said.out == (
        "100 questions to m, 0 answered already\n"
        "to ask, if every answer reaches the cap: about 272 tokens of prompts, 5,000 of answers: "
        f"{cost}\n"
    )
    assert not desk.file.exists()


def test_a_trial_asks_twenty_shows_some_and_tells_what_all_would_cost(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url, 100, "price = { input = 100, output = 1000 }")
        said = desk.collect("--trial")
        paid_once(server.ledger, 20)
        assert said.code == 0
        assert "> question 0\nanswer to question 0\n[m, 4 tokens]" in said.out
        assert "100 questions to m, 20 answered already" in said.out
        bill = "to ask, if answers stay as long as so far: about 220 tokens of prompts, 320 of answers: $0.34"
        assert bill in said.out
        assert desk.collect().code == 0
        paid_once(server.ledger, 100)
        noted = RunFolder(desk.run).read_json("summary.json")["collect"]
        assert noted["answers"] == 100
        assert desk.collect("--trial").code == 0
        assert RunFolder(desk.run).read_json("summary.json")["collect"] == noted


def test_what_would_act_on_a_terminal_is_not_shown(desk: Desk) -> None:
    with FaultServer(answer=lambda _: "\x1b]0;title\x07a\tb\nc") as server:
        desk.write(server.base_url, 1)
        assert "«U+001B»]0;title«U+0007»a\tb\nc\n" in desk.collect("--trial").out
    assert desk.rows[0]["response"] == "\x1b]0;title\x07a\tb\nc"


def test_progress_tells_rate_cost_errors_and_time_left(desk: Desk) -> None:
    with FaultServer(latency=0.25, faults=[Fault("server_error")]) as server:
        price = "price = { input = 100, output = 1000 }\nbudget = { dollars = 5.0 }\nmax_response_tokens = 9"
        desk.write(server.base_url, 30, f"concurrency = 5\n{price}")
        said = desk.collect()
    assert said.code == 0
    lines = [line for line in said.err.splitlines() if line.startswith("collect ")]
    assert "/min" in lines[0]
    assert "of $5.00" in lines[0]
    assert "errors: 1 server-error" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("collect 30/30  ")
    assert "left" not in lines[-1]


def test_what_is_not_configured_is_told(desk: Desk) -> None:
    desk.write("http://127.0.0.1:9/v1", teacher="")
    recipe = desk.recipe.read_text()
    desk.recipe.write_text(recipe.replace('prompts = "prompts.jsonl"', ""))
    assert "data.prompts: must be given to collect" in desk.collect().error
    desk.recipe.write_text(recipe.replace('model = "m"\n', ""))
    said = desk.collect()
    assert said.code == 2
    assert "teacher.model: must be given to collect" in said.error
    desk.recipe.write_text(recipe)
    said = desk.collect(key="")
    assert said.code == 2
    assert "the environment variable TEACHER_KEY is not set" in said.error


# ------------------------------------------------------------------------------------------- the disk


def test_half_a_row_of_a_kill_is_dropped_and_asked_again(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url, 12)
        assert desk.collect().code == 0
        content = desk.file.read_bytes()
        desk.file.write_bytes(content[:-30])
        assert desk.collect().code == 0
        assert server.ledger.seen.total() == 13
    assert len(desk.by_id) == 12


def test_a_spoilt_line_is_named_and_nothing_is_asked_or_lost(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url, 12)
        assert desk.collect().code == 0
        lines = desk.file.read_bytes().split(b"\n")
        spoilt = b"\n".join([*lines[:4], lines[4][:-5], *lines[5:]])
        desk.file.write_bytes(spoilt)
        said = desk.collect()
        assert server.ledger.seen.total() == 12
    assert said.code == 2
    assert f"{desk.file}:5: not a JSON object" in said.error
    assert desk.file.read_bytes() == spoilt


def test_a_full_disk_is_told_and_leaves_whole_rows(desk: Desk) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FaultServer(answer=lambda body: "word " * 1000) as server:
        desk.write(server.base_url, 30, "concurrency = 4")
        # As a full disk does, the limit lets the first part of a row through.
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            said = desk.collect()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert said.code == 2
        kept = len(desk.by_id)
        assert 5 < kept < 12
        assert desk.file.read_bytes().endswith(b"}\n")
        assert f"{desk.file}: cannot be written: " in said.error
        assert f"{kept} of 30 answers are kept" in said.error
        seen = server.ledger.seen.total()
        assert seen <= kept + 8
        assert desk.collect().code == 0
        assert server.ledger.seen.total() == seen + 30 - kept


def test_a_file_that_cannot_be_written_is_told_before_anything_is_asked(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url)
        desk.file.mkdir(parents=True)
        said = desk.collect()
        assert not server.ledger.entries
    assert said.code == 2
    assert f"{desk.file}: cannot be read: Is a directory" in said.error


def test_a_second_process_on_the_folder_is_refused(desk: Desk) -> None:
    with FaultServer() as server:
        desk.write(server.base_url)
        with RunFolder(desk.run).lock():
            said = desk.collect()
        assert not server.ledger.entries
    assert said.code == 2
    assert f"run_folder = {desk.run}: in use by process " in said.error


# -------------------------------------------------------------------------------------------- kills


IN_FLIGHT = 16


def text_of(body: dict[str, Any]) -> str:
    text: str = body["messages"][-1]["content"]
    return text


def end_at_random(desk: Desk, number: int, num_more: int, rng: random.Random) -> None:
    """Start the command and send it a signal once there are so many more answers, or a little later."""
    before = len(desk.rows)
    with desk.start() as process:
        assert KEY.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        end = time.monotonic() + 60
        while len(desk.rows) < before + num_more and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert process.returncode == -number, err
    else:
        assert process.returncode == 128 + number, err
        assert err.endswith("stopped; run the same command to go on\n")


def lost_by_kills(desk: Desk, server: ServerProcess, numbers: Sequence[int], num_prompts: int) -> list[int]:
    """Kill the command with each signal in turn and let it end; how many paid answers each kill lost."""
    rng, lost = random.Random(0), []
    for number in (*numbers, None):
        on_disk = [text_of(row) for row in desk.rows]
        num_entries = len(server.ledger.entries)
        if number is None:
            with desk.start() as process:
                _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
        else:
            end_at_random(desk, number, rng.randint(1, num_prompts // (len(numbers) + 1)), rng)
        entries = settled_ledger(server).entries[num_entries:]
        asked = {text_of(json.loads(entry.body)) for entry in entries if entry.event == "seen"}
        assert not asked & set(on_disk), "an answer on disk was asked for again"
        paid = sum(entry.event in ("paid", "undelivered") for entry in entries)
        lost.append(paid - (len(desk.rows) - len(on_disk)))
    assert sorted(desk.by_id) == sorted(f"p{n}" for n in range(num_prompts))
    desk.assert_secret()
    return lost


def assert_kills_lose_only_what_was_in_flight(
    desk: Desk, folder: Path, numbers: Sequence[int], num_prompts: int
) -> list[int]:
    with fault_process(folder, "latency = 0.2\n") as server:
        desk.write(server.base_url, num_prompts, f"concurrency = {IN_FLIGHT}")
        lost = lost_by_kills(desk, server, numbers, num_prompts)
    assert lost[-1] == 0
    assert all(0 <= number <= IN_FLIGHT for number in lost)
    return lost


def test_three_kills_pay_twice_only_for_what_was_in_flight(desk: Desk, tmp_path: Path) -> None:
    numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGKILL)
    assert_kills_lose_only_what_was_in_flight(desk, tmp_path, numbers, 160)


@pytest.mark.slow
def test_twenty_kills_of_five_hundred_questions(desk: Desk, tmp_path: Path) -> None:
    lost = assert_kills_lose_only_what_was_in_flight(desk, tmp_path, [signal.SIGKILL] * 20, 500)
    sys.stdout.write(f"paid for {500 + sum(lost)} answers to 500 questions; lost at each kill: {lost}\n")


# ---------------------------------------------------------------------------------- what comes of it


def test_training_data_is_what_was_collected_split_by_prompt(desk: Desk, tmp_path: Path) -> None:
    with FaultServer() as server:
        desk.write(server.base_url, 50)
        assert desk.collect().code == 0
    recipe = load_recipe(desk.recipe, ["data.valid_share=0.2"])
    with open_run(recipe) as run:
        split = run.data
    assert 0 < len(split.valid) < 25
    texts = {row.prompt: row.responses[0].text for row in (*split.train, *split.valid)}
    assert texts == {f"question {n}": f"answer to question {n}" for n in range(50)}
    with open_run(load_recipe(desk.recipe, ["data.valid_share=0.2"])) as again:
        assert again.data.fingerprint == split.fingerprint


@pytest.mark.slow
def test_a_whole_run_collects_and_trains_on_it(desk: Desk, tiny_model: Path) -> None:
    from gadfly.stages.pipeline import run_stages

    steps = "max_steps = 1\nbatch_prompts = 4"
    more = (
        "[sampling]\nmax_response_tokens = 8\n[audit]\nallow = ['cap-cuts-teacher']\n"
        "[evaluation]\nprompts = 2\n"
        f"[seqkd]\n{steps}\n[warmup]\n{steps}\ngroup_size = 2\ndiscriminator_only_steps = 1\n"
        f"[gad]\n{steps}\ngroup_size = 2\n"
    )
    with FaultServer() as server:
        desk.write(server.base_url, 12, more=more)
        assert desk.collect().code == 0
        recipe: Recipe = load_recipe(desk.recipe, [f"student.model={tiny_model}", "data.valid_share=0.2"])
        with open_run(recipe) as run:
            run_stages(run)
        paid_once(server.ledger, 12)
    assert run.folder.is_done("gad")
    assert (desk.run / "report.html").exists()


def test_the_recipe_of_the_page_is_one(tmp_path: Path) -> None:
    page = (SOURCE.parent / "docs" / "collecting.md").read_text(encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    assert load_recipe(recipe).teacher.budget.dollars == 20


def test_collecting_loads_no_torch(desk: Desk) -> None:
    script = """
import sys
from gadfly import cli

def command(*arguments):
    sys.argv = ["gadfly", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
    assert "torch" not in sys.modules, arguments

for name in ("collect", "judge", "report"):
    command(name, "--help")
assert "openai" not in sys.modules
command("collect", sys.argv_given, "--dry-run")
command("collect", sys.argv_given)
"""
    with FaultServer() as server:
        desk.write(server.base_url)
        script = script.replace("sys.argv_given", repr(str(desk.recipe)))
        environment = {"PYTHONPATH": str(SOURCE), "TEACHER_KEY": KEY, "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        paid_once(server.ledger, 12)
