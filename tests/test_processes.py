"""Many processes are one: the same numbers, one voice, and an end to every wait."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fault_server import FaultServer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import HashStore

from gadfly.checkpoint import open_checkpoint
from gadfly.distributed.end_requests import EndRequests
from gadfly.distributed.growth import growth_as_progress
from gadfly.distributed.heartbeats import Heartbeats, Status
from gadfly.distributed.processes import Processes, deal
from gadfly.metrics import without_time

FAULTY = Path(__file__).with_name("faulty_rank.py")
EXACT = "student.dtype=float64"


def torchrun(size: int, *arguments: object, program: tuple[object, ...] = ("-m", "gadfly")) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", size]
    # A port of the system's choice, so that two tests at once do not meet.
    return [
        str(part)
        for part in (*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *program, *arguments)
    ]


def done(command: list[str], *, code: int = 0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert ended.returncode == code, ended.stderr[-4000:]
    return ended


def ranks_do(size: int, folder: Path, work: str) -> list[str]:
    """The lines that so many processes print, of which each does `work(ranks)` in a folder."""
    program = f"""
import os
from gadfly.errors import GadflyError
from gadfly.distributed.ranks import open_ranks

{textwrap.dedent(work)}

def end(line):
    print(line, flush=True)
    os._exit(5)

try:
    with open_ranks(end) as ranks:
        work(ranks)
except GadflyError as error:
    if not error.is_shown_elsewhere:
        print(error)
"""
    (folder / "program.py").write_text(program, encoding="utf-8")
    command = torchrun(size, program=(folder / "program.py",))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout.splitlines()


def run_on(size: int, recipe: Path, folder: Path, *overrides: str, stage: str = "run") -> Path:
    """A run on so many processes; gives its folder."""
    command = [sys.executable, "-m", "gadfly"] if size == 1 else torchrun(size)
    done([*command, stage, str(recipe), EXACT, f"run_folder={folder}", *overrides])
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def assert_same_run(one: Path, many: Path, *, weights: str = "model.safetensors") -> None:
    """Metrics and weights to rounding in double precision, samples and answers to the letter."""
    for mine, theirs in zip(rows(one, "metrics.jsonl"), rows(many, "metrics.jsonl"), strict=True):
        wanted = without_time(mine)
        assert without_time(theirs) == {
            key: pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value
            for key, value in wanted.items()
        }
    assert samples_and_answers(one) == samples_and_answers(many)
    for name in ("seqkd/latest/student", "gad/latest/student", "gad/latest/discriminator"):
        mine, theirs = load_file(one / name / weights), load_file(many / name / weights)
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(theirs[key], mine[key], rtol=0, atol=1e-12)


def samples_and_answers(folder: Path) -> list[Any]:
    samples = [
        [sample["text"] for sample in row.get("samples", [])] or row.get("response")
        for row in rows(folder, "samples.jsonl")
    ]
    answers = [(row["model"], row["id"], row["response"]) for row in rows(folder, "generations/same.jsonl")]
    return [samples, answers]


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 8))
def test_every_item_is_dealt_once_and_the_hands_weigh_about_the_same(weights: list[int], size: int) -> None:
    hands = deal(weights, size)
    assert len(hands) == size
    assert sorted(index for hand in hands for index in hand) == list(range(len(weights)))
    loads = [sum(weights[index] for index in hand) for hand in hands]
    # The last item that the heaviest hand got was given to it when it was the lightest.
    assert max(loads) - min(loads) <= max(weights, default=0)


def test_one_process_alone_does_everything_itself() -> None:
    alone = Processes()
    assert (alone.once("a", lambda: 1), alone.gather("b", 2), alone.together("c", lambda: 3)) == (1, [2], 3)
    alone.check_same("d", "4", "nothing")


def test_two_processes_are_one(recipe_file: Path, tmp_path: Path) -> None:
    one, two = (run_on(size, recipe_file, tmp_path / str(size)) for size in (1, 2))
    assert_same_run(one, two)
    shards = list((two / "gad" / "latest" / "trainer" / "student").glob("*.safetensors"))
    assert len(shards) == 2


@pytest.mark.slow
def test_four_processes_with_uneven_groups_and_idle_ranks_are_one(recipe_file: Path, tmp_path: Path) -> None:
    # Three groups for four processes: one has none, and waits in every pass.
    few = ("seqkd.batch_prompts=3", "warmup.batch_prompts=3", "gad.batch_prompts=3")
    more = (
        "checkpoints.in_background=true",
        "engine.activation_checkpointing=true",
        "engine.micro_batch_tokens=40",
    )
    one = run_on(1, recipe_file, tmp_path / "one", *few)
    assert_same_run(one, run_on(4, recipe_file, tmp_path / "four", *few, *more))


@pytest.mark.slow
def test_adapters_on_two_processes_are_those_on_one(recipe_file: Path, tmp_path: Path) -> None:
    one, two = (run_on(size, recipe_file, tmp_path / str(size), "student.lora_rank=4") for size in (1, 2))
    assert_same_run(one, two, weights="adapter_model.safetensors")


@pytest.mark.slow
def test_in_single_precision_the_weights_differ_by_rounding(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / str(size) for size in (1, 2, 4)]
    for size, folder in zip((1, 2, 4), folders, strict=True):
        steps = ("student.dtype=float32", "seqkd.max_steps=20", "seqkd.batch_prompts=3")
        run_on(size, recipe_file, folder, *steps, stage="seqkd")
    start = load_file(tiny_model / "model.safetensors")
    ends = [load_file(folder / "seqkd/latest/student/model.safetensors") for folder in folders]

    def distance(some: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((some[key] - other[key]).square().sum()) for key in start) ** 0.5

    for end in ends[1:]:
        assert distance(end, ends[0]) <= 0.01 * distance(ends[0], start)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_a_run_that_two_processes_saved_goes_on_with_another_number(
    recipe_file: Path, tmp_path: Path, size: int
) -> None:
    whole = run_on(1, recipe_file, tmp_path / "whole")
    # A rank that dies in gad's fourth step, after the checkpoint of the second.
    other = tmp_path / "other"
    faulty(recipe_file, other, "die-in-step", rank=1, at=6 + 4 + 8 + 2 * 3 + 1)
    assert (other / "gad" / "step-000002").is_dir()
    assert not (other / "gad" / "step-000004").exists()
    assert_same_run(whole, run_on(size, recipe_file, other))


def faulty(
    recipe: Path, folder: Path, fault: str, *, rank: int, at: int, size: int = 2, code: int = 1
) -> tuple[list[str], float]:
    """A run with a fault; gives what was told of ranks, and seconds from the fault to the end."""
    program = (FAULTY, fault, rank, at)
    options = (EXACT, f"run_folder={folder}", "engine.timeout_seconds=15")
    ended = done(torchrun(size, "run", recipe, *options, program=program), code=code)
    found = re.search(r"^fault (\S+)$", ended.stderr, re.M)
    assert found is not None, "it has not come to the fault"
    seconds = time.time() - float(found[1])
    return [line for line in ended.stderr.splitlines() if re.search(r"rank \d .*(is|has) ", line)], seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "at", "line", "limit"),
    [
        ("die-in-step", 1, 9, r"^warmup step \d: rank 1 is gone .*; rank 0 waited for ", 20),
        ("die-in-step", 0, 9, r"^warmup step \d: rank 0 is gone .*; rank 1 waited for ", 20),
        ("die-in-save", 1, 2, r"^seqkd step 4: rank 1 is gone .*; rank 0 waited for .*checkpoint", 20),
        ("die-in-hand-over", 1, 260, r"rank 1 is gone .*; rank 0 waited for the hand-over of model\.", 20),
        ("hang-in-step", 1, 9, r"^warmup step \d: rank 1 is stuck \(for 15 s, .*; rank 0 waited for ", 35),
    ],
)
def test_a_rank_that_fails_ends_the_run_in_one_line(
    recipe_file: Path, tmp_path: Path, fault: str, rank: int, at: int, line: str, limit: float
) -> None:
    folder = tmp_path / "run"
    lines, seconds = faulty(recipe_file, folder, fault, rank=rank, at=at)
    assert len(lines) == 1, lines
    assert re.search(line, lines[0])
    assert seconds < limit
    # Whatever is in its place is whole.
    for checkpoint in folder.glob("*/step-*"):
        assert (checkpoint / "manifest.json").exists()


@pytest.mark.slow
def test_a_rank_is_named_while_all_others_are_deaf_to_signals(recipe_file: Path, tmp_path: Path) -> None:
    lines, seconds = faulty(recipe_file, tmp_path / "run", "die-in-deaf-step", rank=1, at=2, size=3)
    assert len(lines) == 1, lines
    assert re.search(r"^seqkd step 2: rank 1 is gone .*; rank [02] waited for ", lines[0])
    # The launcher kills what has not ended 30 s after it was asked to.
    assert seconds < 15


@pytest.mark.slow
def test_processes_end_without_their_launcher(recipe_file: Path, tmp_path: Path) -> None:
    code = -signal.SIGKILL
    lines, seconds = faulty(
        recipe_file, tmp_path / "run", "kill-launcher-in-deaf-step", rank=1, at=2, code=code
    )
    # Nothing is left by which they could agree on who tells it.
    assert 1 <= len(lines) <= 2, lines
    for line in lines:
        assert re.search(r"^seqkd step 2: rank 0 or the launcher is gone; rank [01] waited for ", line)
    assert seconds < 15


@pytest.mark.slow
def test_a_failure_while_ranks_join_ends_the_others_too(recipe_file: Path, tmp_path: Path) -> None:
    lines, seconds = faulty(recipe_file, tmp_path / "run", "fail-in-new-group", rank=1, at=1)
    assert lines == []
    assert seconds < 15


def test_other_code_on_a_rank_is_refused_before_anything_is_written(
    recipe_file: Path, tmp_path: Path
) -> None:
    options = (recipe_file, f"run_folder={tmp_path / 'run'}")
    ended = done(torchrun(2, "run", *options, program=(FAULTY, "other-code", 1, 0)), code=1)
    lines = [line for line in ended.stderr.splitlines() if "code of gadfly" in line]
    assert len(lines) == 1, lines
    assert re.search(r"^code of gadfly: rank 1 has another, rank 0 has \w+; install", lines[0])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_a_dead_rank_ends_like_an_undisturbed_one(recipe_file: Path, tmp_path: Path) -> None:
    whole, broken = run_on(2, recipe_file, tmp_path / "whole"), tmp_path / "broken"
    for fault, at in (("die-in-save", 2), ("die-in-hand-over", 260), ("die-in-step", 5)):
        faulty(recipe_file, broken, fault, rank=1, at=at)
    run_on(2, recipe_file, broken)
    assert_same_run(whole, broken)


def test_an_error_of_all_is_told_once(recipe_file: Path, tmp_path: Path) -> None:
    ended = done(torchrun(2, "seqkd", recipe_file, "seqkd.bogus=1", f"run_folder={tmp_path / 'r'}"), code=1)
    assert len(re.findall(r"bogus", ended.stderr)) == 1
    # torchrun has a traceback of its own.
    assert "gadfly/cli/" not in ended.stderr


def test_the_teacher_is_asked_once_however_many_processes_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = "".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(6))
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    monkeypatch.setenv("TEACHER_KEY", "key")
    with FaultServer(key="key") as server:
        (tmp_path / "recipe.toml").write_text(
            f'name = "test"\n[data]\nprompts = "prompts.jsonl"\n[teacher]\nbase_url = "{server.base_url}"\n'
            'model = "m"\napi_key_env = "TEACHER_KEY"\n[student]\nmodel = "none"\n',
            encoding="utf-8",
        )
        ended = done(torchrun(2, "collect", tmp_path / "recipe.toml"))
        assert sorted(server.ledger.paid.values()) == [1] * 6
    assert len(rows(tmp_path / "runs" / "test", "teacher.jsonl")) == 6
    assert ended.stdout.count("collect: done") == 1


def test_a_rank_that_makes_progress_is_not_stuck() -> None:
    store, messages = HashStore(), []
    statuses = [Status("gad step 7"), Status("gad step 7")]
    for status in statuses:
        status.note("sampling")
    statuses[0].note("the others' samples")
    beats = [Heartbeats(store, rank, 2, status) for rank, status in enumerate(statuses)]
    for one in beats:
        one.timeout_seconds = 2.0
        one.start(messages.append)
    for token in range(25):
        statuses[1].progress(f"token {token} of 30")
        time.sleep(0.2)
    assert messages == []
    time.sleep(2 + 2)
    for one in reversed(beats):
        one.stop()
    assert messages == [
        "gad step 7: rank 1 is stuck (for 2 s, in gad step 7, at token 24 of 30); rank 0 waited for the "
        "others' samples. Run the same command to go on from the last checkpoint."
    ]


@pytest.mark.parametrize("is_patient", [False, True])
def test_a_rank_that_waits_for_the_background_comes_on_with_it(is_patient: bool) -> None:
    store, messages = HashStore(), []
    statuses = [Status("gad step 7"), Status("gad step 7")]
    beside = [status.beside() for status in statuses]
    beats = [Heartbeats(store, rank, 2, status) for rank, status in enumerate(statuses)]
    for status, behind in zip(statuses, beside, strict=True):
        status.note("the end of the checkpoint in the background")
        # Hashing it has no end that one could foresee.
        behind.note("the end of the checkpoint", is_patient=is_patient)
    for one in beats:
        one.timeout_seconds = 2.0
        one.start(messages.append)
    for megabytes in range(25):
        for status, behind in zip(statuses, beside, strict=True):
            if not is_patient:
                behind.progress(f"writing the checkpoint: {megabytes} MB")
            status.follow(behind)
        time.sleep(0.2)
    for one in reversed(beats):
        one.stop()
    assert messages == []


def test_a_folder_that_is_deleted_meanwhile_is_no_error(tmp_path: Path) -> None:
    class Pair(Processes):
        size = 2

    failures: list[threading.ExceptHookArgs] = []
    asked: list[str] = []

    def gone(folder: Path, pattern: str) -> list[Path]:
        asked.append(pattern)
        raise FileNotFoundError(folder)

    with (
        patch("threading.excepthook", failures.append),
        patch.object(Path, "rglob", gone),
        growth_as_progress(tmp_path / "checkpoint", Pair()),
    ):
        time.sleep(1.5)
    assert asked
    assert not failures


def test_a_folder_that_grows_is_progress_and_one_that_does_not_is_none(tmp_path: Path) -> None:
    lines: list[str] = []

    class Told(Processes):
        size = 2

        def progress(self, what: str) -> None:
            lines.append(what)

    folder, beside = tmp_path / "checkpoint", tmp_path / "weights"
    folder.mkdir()
    with growth_as_progress(folder, Told()):
        for megabytes in (1, 2):
            # Whole at once, so that it is not seen half written.
            beside.write_bytes(bytes(megabytes * 10**6))
            os.replace(beside, folder / "weights")
            deadline = time.monotonic() + 30
            while len(lines) < megabytes and time.monotonic() < deadline:
                time.sleep(0.1)
        time.sleep(2.5)
    assert lines == ["writing the checkpoint: 1 MB", "writing the checkpoint: 2 MB"]


def test_a_request_to_end_is_heard_beside_the_main_thread_and_after_asyncio() -> None:
    async def have_asyncio_listen() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    requests = EndRequests()
    try:
        requests.listen()
        assert requests.seconds_since() is None
        asyncio.run(have_asyncio_listen())
        requests.listen()
        signal.raise_signal(signal.SIGTERM)
        seconds = requests.seconds_since()
    finally:
        requests.stop()
        signal.signal(signal.SIGTERM, before)
    assert seconds is not None
    assert 0 <= seconds < 1


@pytest.mark.slow
def test_a_wait_beside_the_main_thread_holds_up_none_in_it(tmp_path: Path) -> None:
    (line,) = ranks_do(
        2,
        tmp_path,
        """
        import threading, time

        def work(ranks):
            beside = ranks.beside()
            slowly = lambda: beside.once("slow", lambda: time.sleep(6), is_patient=True)
            thread = threading.Thread(target=slowly)
            # One rank comes to the slow thing first, the other to the quick one.
            if ranks.rank == 1:
                thread.start()
                time.sleep(0.5)
            started = time.monotonic()
            ranks.once("quick", lambda: None, is_patient=True)
            seconds = time.monotonic() - started
            if ranks.rank == 0:
                thread.start()
            else:
                print(seconds)
            thread.join()
        """,
    )
    assert float(line) < 4


def test_a_checkpoint_waits_for_files_that_another_machine_wrote(tmp_path: Path) -> None:
    # Two views of one folder, of which one learns of the other's file late, and first of a part of it.
    ranks_do(
        2,
        tmp_path,
        """
        import threading, time
        from pathlib import Path
        from gadfly.checkpoint import save_checkpoint

        def arrive(name, content):
            for known in (content[:3], content):
                time.sleep(1)
                (Path("seen-by-0") / name).write_bytes(known)

        def work(ranks):
            def write(folder):
                folder.mkdir(parents=True, exist_ok=True)
                file, content = folder / f"of-{ranks.rank}", b"content"
                file.write_bytes(content)
                if ranks.rank == 1:
                    threading.Thread(target=arrive, args=(file.relative_to("seen-by-1"), content)).start()
                return [file]

            save_checkpoint(Path(f"seen-by-{ranks.rank}"), 2, write, {}, ranks)
        """,
    )
    checkpoint = open_checkpoint(tmp_path / "seen-by-0" / "latest")
    listed = json.loads((checkpoint.path / "manifest.json").read_text())["files"]
    assert sorted(listed) == ["of-0", "of-1"]
    assert (checkpoint.path / "of-1").read_bytes() == b"content"


REFUSED = (
    "the checkpoint could not be written ({}[Errno 28] No space left on device); earlier ones are untouched"
)


def test_a_rank_that_cannot_save_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    lines = ranks_do(
        2,
        tmp_path,
        """
        import time
        from pathlib import Path
        import torch
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        from gadfly.checkpoint import save_checkpoint
        from gadfly.errors import RunFolderError
        from gadfly.tensor_files import save_tensors

        def full(*_):
            raise OSError(28, "No space left on device")

        def work(ranks):
            def write_itself(folder):
                if ranks.rank == 1:
                    full()
                # What the first rank writes meanwhile does not fail by the other's failure.
                time.sleep(1)
                (folder / "model").write_text("weights")
                return []

            def write_with_torch(folder):
                if ranks.rank == 1:
                    HuggingFaceStorageWriter.write_data = full
                return save_tensors({"a": torch.ones(2)}, folder / "trainer", group=ranks.group)

            for write in (write_itself, write_with_torch):
                try:
                    save_checkpoint(Path("gad"), 2, write, {}, ranks)
                except RunFolderError as refused:
                    if ranks.rank == 0:
                        print(refused)
        """,
    )
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"rank 1: gad/step-000002: {REFUSED.format('')}")
    assert lines[1].startswith(f"gad/step-000002: {REFUSED.format('rank 1: ')}")
    assert list((tmp_path / "gad").iterdir()) == []


def test_a_rank_that_cannot_load_is_named_once(tmp_path: Path) -> None:
    lines = ranks_do(
        2,
        tmp_path,
        """
        from pathlib import Path
        import torch
        from torch.distributed.checkpoint import HuggingFaceStorageReader
        from gadfly.tensor_files import load_tensors, save_tensors

        def fail(*_):
            raise OSError(5, "Input/output error")

        def work(ranks):
            save_tensors({"a": torch.ones(2)}, Path("tensors"), group=ranks.group)
            if ranks.rank == 1:
                HuggingFaceStorageReader.read_data = fail
            load_tensors({"a": torch.zeros(2)}, Path("tensors"), group=ranks.group)
        """,
    )
    line = "tensors: cannot be read: rank 1: [Errno 5] Input/output error; restore it from an intact copy"
    assert lines == [line]
