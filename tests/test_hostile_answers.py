"""Answers of servers and judges: whatever is sent is an answer, a verdict or a counted failure."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from gadfly.api.batch_rows import BatchRows
from gadfly.api.chat_answer import ChatAnswer, RequestFailed, answer_of
from gadfly.api.chat_api import ChatApi
from gadfly.api.spending import Spending
from gadfly.config import ApiConfig
from gadfly.stages.judge.pairwise_protocol import parse_preference
from gadfly.stages.judge.score_protocol import parse_scores
from gadfly.visible_text import visible

odd = st.recursive(
    st.sampled_from([None, True, -1, 10**400, 1e999, float("nan"), "", "\ud800\x00", "\x1b]0;x\x07"])
    | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
COMPLETION: dict[str, Any] = {
    "id": "a",
    "model": "m",
    "choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}
completions = st.builds(lambda key, value: {**COMPLETION, key: value}, st.sampled_from([*COMPLETION]), odd)
messages = st.builds(
    lambda key, value: {**COMPLETION, "choices": [{"message": {"content": "4", key: value}}]},
    st.sampled_from(["content", "refusal", "role"]),
    odd,
)


def is_sound(answer: ChatAnswer) -> bool:
    """Whether it can be written to disk, shown and paid for."""
    text = "".join([answer.text, answer.model, answer.finish_reason or "", answer.refusal or ""])
    text.encode()
    return answer.usage is None or 0 <= answer.usage.total < 2**60


@settings(deadline=None)
@given(body=completions | messages | odd)
def test_whatever_a_server_sends_is_an_answer_or_a_failure(body: Any) -> None:
    content = ChatCompletion.construct(**body) if isinstance(body, dict) and "id" in body else body
    try:
        assert is_sound(answer_of(content, None, 1))
    except RequestFailed as failure:
        if failure.kind not in ("not-a-completion", "no-choice"):
            raise AssertionError(str(failure)) from failure


@settings(deadline=None, max_examples=60)
@given(
    row=st.dictionaries(st.sampled_from(["response", "error", "custom_id"]), odd)
    | st.builds(lambda body: {"response": {"status_code": 200, "body": body}}, completions | odd)
    | st.builds(lambda code, body: {"response": {"status_code": code, "body": body}}, odd, odd)
)
def test_whatever_a_batch_brings_is_an_answer_or_a_failure(row: dict[str, Any]) -> None:
    config = ApiConfig(base_url="http://localhost:9/v1", model="m", api_key_env="")
    rows = BatchRows(ChatApi(config, "teacher", Spending(config)))
    try:
        assert is_sound(rows.answer(row, 1, "max_tokens"))
    except RequestFailed as failure:
        shown = visible(str(failure))
        if "\x1b" in shown or len(shown) > 10_000:
            raise AssertionError(shown) from failure


verdicts = st.lists(
    st.sampled_from(["[[A]]", "[[B]]", "[[", "8 9", "8", "\n", "<think>", "</think>", "**", "\x00", "\u202e"])
    | st.text(max_size=3),
    max_size=8,
).map("".join)


@given(text=verdicts)
def test_whatever_a_judge_says_is_a_verdict_in_range_or_none(text: str) -> None:
    assert parse_preference(text) in ("first", "second", "tie", None)
    scores = parse_scores(text)
    assert scores is None or all(1 <= score <= 10 for score in scores)


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "[[A]]", "[[", "8 ", "*", "\n", " ", "9", "9/10 ", "\x00"]
)
def test_ten_megabytes_of_a_judge_are_read_in_seconds(piece: str) -> None:
    text = piece * (10_000_000 // len(piece))
    began = time.monotonic()
    assert parse_preference(text) in ("first", None)
    assert parse_scores(text) is None
    assert time.monotonic() - began < 20


def test_an_answer_nested_too_deep_is_no_answer_and_no_crash() -> None:
    deep: Any = "4"
    for _ in range(400):
        deep = [deep]
    body = {**COMPLETION, "choices": [{"message": {"content": deep}}]}
    assert answer_of(ChatCompletion.construct(**body), None, 1).text == ""
    assert json.dumps(deep)
