"""A run folder that was edited, mixed up or sent by a stranger: each reader takes it or says one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import a_run

from gadfly.api.batch_book import BOOK_FILE, BatchBook
from gadfly.api.paid_answers import PaidAnswers, charged_to, usage_of
from gadfly.errors import GadflyError, RunFolderError
from gadfly.run_folder import RunFolder
from gadfly.stages.watch import Watched, snapshot

DEEP = b"[" * 100_000
ODD: tuple[Any, ...] = (
    *(None, True, -1, 10**400, -(10**400), 2**63, 1e308, -1e308, 1e999, float("nan"), "", "x", "\ud800\x00"),
    *([], [1], [[]], {}, {"a": 1}, {"value": "x"}, {"value": 1.0, "n": 1, "interval": [1]}),
)
odd = st.sampled_from(ODD)

# Rows that are right but for what a test puts into them.
ALARM = {"stage": "gad", "step": 9, **dict.fromkeys(("name", "evidence", "cause", "advice", "action"), "a")}
ROLLOUT = {"stage": "gad", "step": 9, "kind": "rollout", "id": "a", "prompt": "p", "teacher": "t"}
ROWS: dict[str, dict[str, Any]] = {
    "metrics.jsonl": {"stage": "gad", "step": 200, "student/kl_nats": 0.5, "time/unix": 60.0},
    "samples.jsonl": {**ROLLOUT, "samples": [{"text": "a", "finished": True, "score": 1.0}]},
    "alarms.jsonl": ALARM,
    "gad/remedies.jsonl": {**ALARM, "back_to": 3, "changes": {"gad.kl_coefficient": 0.1}},
    "generations/ships.jsonl": {"model": "gad", "id": "x", "prompt": "p", "response": "r", "finished": True},
}
OBJECTS: dict[str, Any] = {
    # As the run has it.
    "summary.json": None,
    "config.json": None,
    "audit.json": {"audit": {"roles": {"teacher": {"figures": {}}}, "findings": []}},
    "environment.json": {"packages": {"torch": "2"}, "python": "3", "machine": "m"},
    "gad/stage.json": {"settings": {}, "done": False, "total_steps": 9, "steps": 3, "seconds": 1.0},
}


def one_line(error: GadflyError) -> bool:
    return "\n" not in str(error) and 0 < len(str(error)) < 1000


def looked_at(run: Any) -> None:
    """Read by the report and by watch, which give a page and a screen, or one line."""
    for look in (run.page, lambda: snapshot(Watched(run.folder.path))):
        try:
            look()
        except RunFolderError as error:
            if not one_line(error) or str(run.folder.path) not in str(error):
                raise AssertionError(str(error)) from error


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(content=st.binary(max_size=40) | st.sampled_from([DEEP, b'{"a":' * 50_000, b"\xff\xfe", b"null"]))
def test_any_bytes_are_an_object_or_one_line(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + content + b"\n")
    for read in (lambda: folder.read_json("a.json"), lambda: folder.rows("a.jsonl")):
        try:
            read()
        except RunFolderError as error:
            if not one_line(error) or str(tmp_path) not in str(error):
                raise AssertionError(str(error)) from error
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n')
    assert folder.rows("a.jsonl") == [{"a": 1}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(data=st.data())
def test_a_row_with_any_value_in_any_field_is_shown_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    run = a_run(tmp_path, steps=3)
    name = data.draw(st.sampled_from(sorted(ROWS)))
    key = data.draw(st.sampled_from(sorted(ROWS[name])))
    values = odd | st.sampled_from([[{"text": 1}], [{"text": "a", "finished": True, "score": "x"}], [5]])
    (run.folder.path / name).parent.mkdir(exist_ok=True)
    with (run.folder.path / name).open("a") as file:
        file.write(json.dumps({**ROWS[name], key: data.draw(values)}) + "\n")
    looked_at(run)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_lacks_a_field_or_is_too_deep_is_one_line(name: str, tmp_path: Path) -> None:
    run = a_run(tmp_path, steps=3)
    path = run.folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{}\n")
    looked_at(run)
    path.write_bytes(DEEP + b"\n")
    with pytest.raises(RunFolderError, match=r"jsonl:1: not a JSON object \(nested too deep\); mend"):
        run.page()


def paths_of(value: Any) -> list[tuple[Any, ...]]:
    """Every place within nested objects."""
    if not isinstance(value, dict):
        return [()]
    return [(), *((key, *rest) for key, inner in value.items() for rest in paths_of(inner))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(data=st.data())
def test_an_object_with_any_value_anywhere_is_shown_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    run = a_run(tmp_path, steps=3)
    name = data.draw(st.sampled_from(sorted(OBJECTS)))
    path = run.folder.path / name
    path.parent.mkdir(exist_ok=True)
    content: Any = OBJECTS[name] or json.loads(path.read_bytes())
    place, value = data.draw(st.sampled_from(paths_of(content))), data.draw(odd)
    changed = json.loads(json.dumps(content))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if place:
        inner[place[-1]] = value
    path.write_bytes(json.dumps(changed if place else value).encode())
    looked_at(run)
    path.unlink()


@pytest.mark.parametrize("stage", ["../../outside", "/etc", "a\x00b", "a" * 5000, "\ud800", ".", ""])
def test_the_name_of_a_stage_in_a_row_is_no_path_to_follow(stage: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "in" / "deep", steps=3)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "stage.json").write_text('{"settings": {"secret": 1}, "steps": 77}', encoding="utf-8")
    with (run.folder.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "step": 5, "student/loss": 1.0}) + "\n")
    summary = run.folder.read_json("summary.json")
    summary["stages"][stage] = {"steps": 5, "seconds": 1.0}
    (run.folder.path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "secret" not in run.page()
    looked_at(run)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(key=st.sampled_from(["key", "response", "teacher", "mark", "usage", "charged", "messages"]), value=odd)
def test_a_paid_answer_with_any_value_is_kept_or_one_line(tmp_path: Path, key: str, value: Any) -> None:
    rows = [{"key": "a", "response": "4"}, {"key": "b", "response": "5", key: value}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "teacher.jsonl").write_text(content, encoding="utf-8")
    try:
        answers = PaidAnswers(RunFolder(tmp_path), "teacher.jsonl")
    except RunFolderError as error:
        if not one_line(error) or "teacher.jsonl:2: " not in str(error):
            raise AssertionError(str(error)) from error
    else:
        assert answers.by_key["a"] == rows[0]
        for row in answers.by_key.values():
            assert 0 <= usage_of(row).total < 2**60
            assert 0 <= charged_to(row).total < 2**60
    # Nothing that was paid for is touched by reading it.
    assert (tmp_path / "teacher.jsonl").read_text(encoding="utf-8") == content


@settings(deadline=None)
@given(counts=st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), odd))
def test_counts_that_are_none_count_nothing(counts: dict[str, Any]) -> None:
    assert 0 <= usage_of({"usage": counts}).total < 2**60


BATCH = {"questions": 1, "name": "ab-12", "cap_name": "max_tokens", "noted_at": 1.0, "file_id": "f"}
QUESTION = {"about": {}, "model": "m", "parameters": {}, "sample_index": 0, "attempts": 1}


def book(path: Path, noted: Any, question: Any) -> BatchBook:
    (path / "collect").mkdir(exist_ok=True)
    (path / BOOK_FILE).write_text(json.dumps({"batches": noted}), encoding="utf-8")
    (path / "collect" / "batch-ab-12.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    return BatchBook(RunFolder(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    where=st.sampled_from([*BATCH, "batch_id", "batches", *QUESTION, "messages", "unknown"]),
    value=odd | st.just([{"role": 5, "content": "a"}]),
)
def test_a_book_of_batches_with_any_value_is_read_or_one_line(tmp_path: Path, where: str, value: Any) -> None:
    question = {**QUESTION, "messages": [{"role": "user", "content": "a"}]}
    noted: Any = [{**BATCH, where: value} if where in (*BATCH, "batch_id", "unknown") else BATCH]
    asked = {**question, where: value} if where in question else question
    try:
        read = book(tmp_path, value if where == "batches" else noted, asked)
    except RunFolderError as error:
        if not one_line(error) or not str(error).startswith(str(tmp_path)):
            raise AssertionError(str(error)) from error
    else:
        assert len(read.open) <= 1


@pytest.mark.parametrize("name", ["/../../victim", "a/../../../victim", "../x", "", "ab-12.jsonl", "AB"])
def test_a_batch_cannot_name_a_file_outside_the_folder(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in (run / "collect" / "batch-", run / "collect" / "batch-a"):
        folder.mkdir(parents=True)
    victim = tmp_path / "victim.jsonl"
    victim.write_text("precious\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not one of ours"):
        book(run, [{**BATCH, "name": name, "questions": 0}], {})
    assert victim.read_text(encoding="utf-8") == "precious\n"


@pytest.mark.parametrize("owner", [b"\xff" * 10, b"9" * 10**6, b"\x1b]0;x\x07", b""])
def test_a_lock_with_anything_in_it_is_told_in_one_line(owner: bytes, tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock():
        (tmp_path / ".lock").write_bytes(owner)
        # A lock is of the open file: another one is refused, in this process too.
        with pytest.raises(RunFolderError, match="in use by") as refused, RunFolder(tmp_path).lock():
            pass
    assert one_line(refused.value)
    assert os.path.getsize(tmp_path / ".lock") == len(owner)


def test_a_stage_note_without_its_settings_is_one_of_other_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "gad" / "step-000001").mkdir(parents=True)
    folder.write_json("gad/stage.json", {"done": True})
    with pytest.raises(RunFolderError, match="finished with other settings: seed = None, now 0"):
        folder.begin("gad", {"seed": 0})
