"""A run folder has one owner, its files are whole at any moment, and it knows what is done and how."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from gadfly.config import Recipe
from gadfly.errors import RunFolderError
from gadfly.manifest import hash_file
from gadfly.run_folder import RunFolder, write_text
from gadfly.stage_settings import differences, stage_settings

SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )


@pytest.fixture
def owner(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run folder."""
    process = python(
        """
        import sys, time
        from gadfly.run_folder import RunFolder
        with RunFolder(sys.argv[1]).lock():
            print("owned", flush=True)
            time.sleep(100)
        """,
        run.path,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_the_first(run: RunFolder, owner: subprocess.Popen[str]) -> None:
    with pytest.raises(RunFolderError) as refusal, run.lock():
        pass
    assert str(refusal.value) == (
        f"run_folder = {run.path}: in use by process {owner.pid}; "
        f"wait for it, stop it, or choose another name"
    )


def test_a_killed_owner_leaves_the_folder_free(run: RunFolder, owner: subprocess.Popen[str]) -> None:
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_a_folder_is_free_again_when_its_owner_is_done_or_fails(run: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    with run.lock():
        pass
    with run.lock():
        pass


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run"
    with pytest.raises(RunFolderError) as refusal, RunFolder(path).lock():
        pass
    message = f"run_folder = {path}: cannot be written: Not a directory; choose another with run_folder=…"
    assert str(refusal.value) == message


def test_what_is_written_is_read(run: RunFolder) -> None:
    run.write_json("a/b.json", {"text": "ünï\u2028code", "n": 1})
    assert run.read_json("a/b.json") == {"text": "ünï\u2028code", "n": 1}
    assert run.read_json("none.json") == {}
    run.write_rows("rows.jsonl", [{"n": 1}])
    run.append_rows("rows.jsonl", [{"text": "a\u2028b\x85c\rd\ne"}])
    run.append_rows("new/rows.jsonl", [{"n": 2}])
    assert run.rows("rows.jsonl") == [{"n": 1}, {"text": "a\u2028b\x85c\rd\ne"}]
    assert run.rows("new/rows.jsonl") == [{"n": 2}]
    assert run.rows("none.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_old_file(run: RunFolder) -> None:
    run.write_json("summary.json", {"n": 1})
    (run.path / f".summary.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(RunFolderError) as refusal:
        run.write_json("summary.json", {"n": 2})
    assert str(refusal.value) == (
        f"{run.path / 'summary.json'}: cannot be written: No space left on device; "
        f"what was there is untouched. Make room or mend the folder, and run the same command to go on."
    )
    assert run.read_json("summary.json") == {"n": 1}
    assert [path.name for path in run.path.iterdir()] == ["summary.json"]


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_half_one(run: RunFolder) -> None:
    run.write_json("summary.json", {"n": 1})
    run.append_rows("rows.jsonl", [{"n": 1}])
    process = python(
        """
        import resource, sys
        from gadfly.errors import RunFolderError
        from gadfly.run_folder import RunFolder
        run = RunFolder(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        try:
            run.write_json("summary.json", {"n": "x" * 100})
        except RunFolderError as refusal:
            print(refusal)
        try:
            run.append_rows("rows.jsonl", [{"n": "x" * 100}])
        except RunFolderError as refusal:
            print(refusal)
        """,
        run.path,
    )
    stdout, stderr = process.communicate()
    assert stderr == ""
    summary, rows = stdout.splitlines()
    assert summary.startswith(f"{run.path / 'summary.json'}: cannot be written: File too large; ")
    assert rows.startswith(f"{run.path / 'rows.jsonl'}: cannot be written: File too large; ")
    assert run.read_json("summary.json") == {"n": 1}
    assert sorted(path.name for path in run.path.iterdir()) == ["rows.jsonl", "summary.json"]
    assert (run.path / "rows.jsonl").stat().st_size == 20
    assert run.rows("rows.jsonl") == [{"n": 1}]
    run.append_rows("rows.jsonl", [{"n": 2}])
    assert run.rows("rows.jsonl") == [{"n": 1}, {"n": 2}]


def test_a_place_that_cannot_be_written_is_a_users_error(run: RunFolder) -> None:
    run.write_json("file", {})
    for attempt in (
        lambda: run.write_json("file/a.json", {}),
        lambda: run.append_rows("file/a.jsonl", [{}]),
        lambda: run.read_json("file/a.json"),
        lambda: run.rows("file/a.jsonl"),
    ):
        with pytest.raises(RunFolderError, match=r"file/a\.jsonl?: cannot be (written|read): "):
            attempt()


def test_a_last_row_without_a_line_break_is_a_row(run: RunFolder) -> None:
    run.path.mkdir()
    (run.path / "rows.jsonl").write_bytes(b'{"n": 1}\n{"n": 2}')
    assert run.rows("rows.jsonl") == [{"n": 1}, {"n": 2}]
    run.append_rows("rows.jsonl", [])
    run.append_rows("rows.jsonl", [{"n": 3}])
    assert (run.path / "rows.jsonl").read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n": 3}\n'


@pytest.mark.parametrize("half", [b'{"n": 2', '{"text": "ü'.encode()[:-1], b"{"])
def test_a_row_cut_by_a_kill_is_neither_read_nor_glued_to_the_next(run: RunFolder, half: bytes) -> None:
    run.append_rows("rows.jsonl", [{"text": "é"}])
    with open(run.path / "rows.jsonl", "ab") as file:
        file.write(half)
    assert run.rows("rows.jsonl") == [{"text": "é"}]
    run.append_rows("rows.jsonl", [{"n": 3}])
    assert run.rows("rows.jsonl") == [{"text": "é"}, {"n": 3}]


def test_a_first_row_cut_by_a_kill_goes(run: RunFolder) -> None:
    run.path.mkdir()
    (run.path / "rows.jsonl").write_bytes(b'{"n": ')
    assert run.rows("rows.jsonl") == []
    run.append_rows("rows.jsonl", [{"n": 1}])
    assert run.rows("rows.jsonl") == [{"n": 1}]


def test_rows_outlive_a_kill_in_mid_append(run: RunFolder) -> None:
    process = python(
        """
        import sys
        from gadfly.run_folder import RunFolder
        run, number = RunFolder(sys.argv[1]), 0
        while True:
            run.append_rows("rows.jsonl", [{"n": number, "text": "ü" * 5000}])
            print(number, flush=True)
            number += 1
        """,
        run.path,
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 30:
        pass
    process.kill()
    announced = [int(line) for line in process.communicate()[0].splitlines()]
    before = run.rows("rows.jsonl")
    assert [row["n"] for row in before] == list(range(len(before)))
    assert len(before) > max([30, *announced])
    run.append_rows("rows.jsonl", [{"n": "next"}])
    assert run.rows("rows.jsonl") == [*before, {"n": "next"}]


def test_a_damaged_row_or_file_is_named(run: RunFolder) -> None:
    run.path.mkdir()
    (run.path / "rows.jsonl").write_text('{"n": 1}\n{"n": 2\n{"n": 3}\n')
    with pytest.raises(
        RunFolderError, match=r"rows\.jsonl:2: not a JSON object \(.*\); mend or delete that line"
    ):
        run.rows("rows.jsonl")
    for damaged in ("{", "5", '[["a"]]', '"text"'):
        (run.path / "summary.json").write_text(damaged)
        with pytest.raises(RunFolderError, match=r"summary\.json: not a JSON object .*run again"):
            run.read_json("summary.json")


def test_only_the_rows_to_be_written_again_are_dropped(run: RunFolder) -> None:
    run.append_rows("rows.jsonl", [{"n": n} for n in range(5)])
    run.keep_rows("rows.jsonl", lambda row: row["n"] < 3)
    run.keep_rows("none.jsonl", lambda row: False)
    assert run.rows("rows.jsonl") == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert not (run.path / "none.jsonl").exists()


def test_what_an_earlier_attempt_lost_is_not_counted_for_the_next(run: RunFolder) -> None:
    run.begin("gad", {"seed": 0})
    run.finish("gad", steps=3, seconds=9.0, lost_seconds=500.0)
    run.begin("gad", {"seed": 1})
    run.finish("gad", steps=3, seconds=8.0)
    assert run.read_json("summary.json")["stages"] == {"gad": {"steps": 3, "seconds": 8.0}}


def test_a_stage_goes_on_under_the_same_settings(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"seed": 0, "gad": {"learning_rate": 1e-6, "adam_betas": (0.9, 0.95)}}
    assert run.begin("gad", settings)
    assert run.begin("gad", settings)
    assert not run.is_done("gad")
    run.finish("gad", steps=3, seconds=1.5)
    assert not run.is_done("gad"), "without a checkpoint there is nothing that later stages could start from"
    with caplog.at_level(logging.WARNING, logger="gadfly"):
        assert run.begin("gad", settings)
    assert caplog.messages == ["gad: done before, but its checkpoints are gone; doing it again"]
    caplog.clear()
    run.write_json("gad/step-000003/manifest.json", {})
    assert run.is_done("gad")
    with caplog.at_level(logging.INFO, logger="gadfly"):
        assert not run.begin("gad", settings)
    assert caplog.messages == ["gad: done already, 3 steps in 2 s"]
    assert run.read_json("summary.json")["stages"] == {"gad": {"steps": 3, "seconds": 1.5}}


def test_changed_settings_are_named_with_old_and_new(run: RunFolder) -> None:
    begun = {"seed": 0, "gad": {"learning_rate": 1e-6, "group_size": 8}, "start": "a"}
    now = {"seed": 1, "gad": {"learning_rate": 1e-6, "group_size": 4}, "start": "a"}
    run.begin("gad", begun)
    run.write_json("gad/step-000003/manifest.json", {})
    for state in ("begun", "finished"):
        with pytest.raises(RunFolderError) as refusal:
            run.begin("gad", now)
        assert str(refusal.value) == (
            f"{run.path / 'gad'}: {state} with other settings: gad.group_size = 8, now 4; seed = 0, now 1. "
            f"Put them back, choose another name, or delete that folder to do the stage again."
        )
        run.finish("gad", steps=1, seconds=1.0)
    with pytest.raises(RunFolderError, match="finished with other settings"):
        run.begin("gad", now)


def test_a_stage_goes_on_with_another_sampler_and_other_servers(run: RunFolder) -> None:
    run.begin("gad", {"seed": 0, "sampling": {"backend": "auto", "servers": ["http://gone:8000"]}})
    run.write_json("gad/step-000003/manifest.json", {})
    assert run.begin("gad", {"seed": 0, "sampling": {"backend": "local", "servers": []}})


def test_a_finished_stage_is_in_the_summary_whenever_the_kill_comes(run: RunFolder) -> None:
    process = python(
        """
        import os, sys
        from gadfly.run_folder import RunFolder
        run = RunFolder(sys.argv[1])
        run.begin("gad", {})
        # The kill comes with the rename that marks the stage as done.
        rename = os.replace
        def kill_at_last(source, target):
            if str(target).endswith("stage.json"):
                os.kill(os.getpid(), 9)
            rename(source, target)
        os.replace = kill_at_last
        run.finish("gad", steps=3, seconds=1.0)
        """,
        run.path,
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert run.read_json("summary.json")["stages"] == {"gad": {"steps": 3, "seconds": 1.0}}
    assert run.begin("gad", {})


def test_a_stage_that_is_begun_anew_leaves_nothing_of_the_old_model(run: RunFolder) -> None:
    figures = {"rouge_l": {"value": 0.5, "n": 1, "interval": [0, 1]}}

    def answer(model: str) -> dict[str, object]:
        return {"model": model, "id": "1", "prompt": "p", "response": "r", "finished": True}

    run.write_rows("generations/ships.jsonl", [answer("seqkd"), answer("gad")])
    run.write_rows("generations/planes.jsonl", [answer("seqkd"), answer("gad/best")])
    run.write_rows("verdicts/planes.jsonl", [{"model": "gad/best", "verdict": 7}])
    for model in ("seqkd", "gad"):
        run.begin(model, {})
        run.finish(model, steps=3, seconds=1.0)
        run.update_summary("evaluation", {model: {"ships": figures}})
    run.update_summary("evaluation", {"gad/best": {"planes": figures}})
    run.update_summary("best", {"gad": {"step": 3}})
    run.update_summary("pairwise", {"ships": {}, "planes": {}, "trains": {}})
    before = run.read_json("summary.json")
    # Going on changes nothing.
    run.begin("gad", {})
    assert run.read_json("summary.json") == before
    shutil.rmtree(run.stage("gad"))
    run.begin("gad", {"seed": 1})
    assert run.read_json("summary.json") == {
        "stages": {"seqkd": {"steps": 3, "seconds": 1.0}},
        "evaluation": {"seqkd": {"ships": figures}},
        "best": {},
        "pairwise": {"trains": {}},
    }
    for test_set in ("ships", "planes"):
        assert run.rows(f"generations/{test_set}.jsonl") == [answer("seqkd")]
    assert run.rows("verdicts/planes.jsonl") == []


def test_differences_are_found_in_every_table() -> None:
    old = {"a": 1, "b": {"c": [1], "d": None}, "e": "x"}
    new = {"a": 1, "b": {"c": [2]}, "f": True}
    assert list(differences(old, new)) == ["b.c = [1], now [2]", "e = 'x', now None", "f = None, now True"]


def test_settings_leave_out_what_changes_neither_weights_nor_samples() -> None:
    def settings(**changes: dict[str, object]) -> dict[str, object]:
        recipe = {"name": "a", "student": {"model": "m"}} | changes
        return stage_settings(Recipe.model_validate(recipe), ("data", "student", "sampling", "seqkd", "gad"))

    plain = settings()
    assert plain["seed"] == 0
    assert settings(gad={"save_every": 1, "evaluate_every": 1, "start_from": 5}) == plain
    assert settings(seqkd={"equal_time": True}) == plain
    assert settings(sampling={"max_parallel_responses": 1}) == plain
    assert settings(sampling={"servers": ["http://a:8000"]}) == plain
    assert settings(sampling={"backend": "vllm"}) == plain
    assert settings(warmup={"epochs": 3}, checkpoints={"keep_last": 5}) == plain
    assert settings(gad={"group_size": 2}) != plain
    assert settings(student={"model": "n"}) != plain
    assert settings(data={"valid_share": 0.5}) != plain
    assert json.loads(json.dumps(settings(student={"model": "m", "adam_betas": [0.9, 0.95]}))) == settings(
        student={"model": "m", "adam_betas": [0.9, 0.95]}
    )


def test_a_write_that_the_disk_cannot_hold_is_refused_beforehand(run: RunFolder) -> None:
    with run.lock():
        run.check_free_space(1)
        with pytest.raises(RunFolderError) as refusal:
            run.check_free_space(10**18)
    message = str(refusal.value)
    assert message.startswith(f"{run.path}: ")
    assert message.endswith(
        " MB free, a checkpoint needs 1000000000000 MB; make room and run the same command to go on"
    )


def test_the_summary_is_merged_table_by_table(run: RunFolder) -> None:
    run.update_summary("evaluation", {"base": {"a": 1}})
    run.update_summary("evaluation", {"base": {"b": 2}, "gad": {"a": 3}})
    run.update_summary("stages", {"gad": {"steps": 3}})
    assert run.read_json("summary.json") == {
        "evaluation": {"base": {"a": 1, "b": 2}, "gad": {"a": 3}},
        "stages": {"gad": {"steps": 3}},
    }


def test_a_hash_is_of_the_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file(tmp_path / "a") == known
