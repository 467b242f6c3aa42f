"""A run folder seen from outside: while it goes, after it, and with hostile text in it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_runs import Row, a_run, empty_run, sampled

from gadfly.errors import RunFolderError
from gadfly.run_folder import RunFolder
from gadfly.stages.watch import Watched, screen, snapshot

SOURCE = Path(__file__).resolve().parents[1] / "src"
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m red\u202e\r\nnext\tline\x00" + "a" * 2000
ALARM: Row = {
    "stage": "gad",
    "step": 90,
    "name": "drift",
    "evidence": "KL 1.20 nats a token",
    "cause": "It runs after the discriminator.",
    "advice": "Raise gad.kl_coefficient.",
    "action": "warn",
}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "gadfly", "watch", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "xterm", "COLUMNS": "100"}


def going(path: Path, *, total: int = 480) -> RunFolder:
    """A run amid its gad stage, ten seconds a step, owned by this process."""
    folder = a_run(path, steps=120).folder
    rows = folder.rows("metrics.jsonl")
    now = time.time()
    for row in rows:
        if row["stage"] == "gad":
            row["time/unix"] = now - 10.0 * (120 - row["step"])
    folder.write_rows("metrics.jsonl", [row for row in rows if row["stage"] != "seqkd"])
    folder.write_json("gad/stage.json", {"settings": {}, "done": False, "total_steps": total})
    (folder.path / ".lock").write_text(str(os.getpid()))
    return folder


def test_a_run_that_goes_shows_progress_time_left_and_trends(tmp_path: Path) -> None:
    folder = going(tmp_path)
    text = snapshot(Watched(folder.path))
    assert re.search(r"pirate .* running, last row 0 s ago", text)
    assert "120 of 480 steps, 60.0 min left" in text
    (accuracy,) = re.findall(r"told apart .*", text)
    assert "0.847" in accuracy
    assert "↓" in accuracy
    (spread,) = re.findall(r"in-group spread .*", text)
    assert "→" in spread
    assert "no alarm" in text
    assert "sample 1" in text


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    folder = a_run(tmp_path).folder
    for stage in ("seqkd", "gad"):
        folder.write_json(f"{stage}/stage.json", {"settings": {}, "done": True})
    text = snapshot(Watched(folder.path))
    assert "not running" in text
    assert "GAD                           done, 120 steps" in text
    assert "left" not in text


def test_alarms_and_remedies_are_shown(tmp_path: Path) -> None:
    folder = going(tmp_path)
    folder.append_rows("alarms.jsonl", [ALARM])
    went_back = ALARM | {
        "name": "collapse",
        "back_to": 50,
        "changes": {"gad.kl_coefficient": 0.01},
        "is_done": True,
    }
    folder.append_rows("gad/remedies.jsonl", [went_back])
    text = snapshot(Watched(folder.path))
    assert "drift  gad step 90 (warn): KL 1.20 nats a token" in text
    assert "likely cause: It runs after" in text
    assert "what to do: Raise gad.kl_coefficient." in text
    assert "gad from step 90 to 50 for collapse: gad.kl_coefficient = 0.01" in text
    assert "no alarm" not in text


def test_looking_again_shows_what_came_since(tmp_path: Path) -> None:
    folder = going(tmp_path)
    watched = Watched(folder.path)
    folder.append_rows("metrics.jsonl", [{"stage": "gad", "step": 121, "time/unix": time.time()}])
    folder.append_rows("alarms.jsonl", [ALARM])
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "gad", "st')
    watched.look()
    assert "121 of 480" in snapshot(watched)
    assert "drift" in snapshot(watched)
    # A stage that resumed has dropped the rows beyond its checkpoint.
    folder.keep_rows("metrics.jsonl", lambda row: row["step"] <= 100)
    folder.keep_rows("alarms.jsonl", lambda row: False)
    watched.look()
    assert "100 of 480" in snapshot(watched)
    assert "no alarm" in snapshot(watched)


def test_hostile_text_never_reaches_the_terminal_raw(tmp_path: Path) -> None:
    folder = going(tmp_path)
    rows = [sampled(130) | {"prompt": HOSTILE, "teacher": HOSTILE, "stage": HOSTILE}]
    rows[0]["samples"] = [{"text": HOSTILE, "finished": True, "score": 1.5}, "no sample", {"score": 10**400}]
    (folder.path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alarm = dict.fromkeys(ALARM, HOSTILE)
    (folder.path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    folder.write_json("config.json", {"name": HOSTILE})
    metric = {"stage": HOSTILE, "step": 1, HOSTILE: HOSTILE, "student/kl_nats": 10**400, "time/unix": "x"}
    (folder.path / "metrics.jsonl").write_text(json.dumps(metric) + "\n")
    text = snapshot(Watched(folder.path))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028]", text)
    assert "«U+001B»[2J" in text
    assert max(map(len, text.splitlines())) < 5000
    done = subprocess.run(
        command(folder.path), capture_output=True, text=True, env=environment(), timeout=60, check=True
    )
    assert "\x1b" not in done.stdout


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run folder.*runs/NAME"):
        Watched(tmp_path)
    folder = going(tmp_path)
    for bad in (b"[1]\n", b"\xff\n", b'{"stage": "gad"}\n', b"[" * 100_000 + b"\n"):
        (folder.path / "metrics.jsonl").write_bytes(bad)
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
            Watched(folder.path)


def test_before_the_first_row_there_is_something_to_see(tmp_path: Path) -> None:
    run = empty_run(tmp_path)
    assert "nothing logged yet" in snapshot(Watched(run.folder.path))


def test_on_a_small_screen_metrics_give_way(tmp_path: Path) -> None:
    folder = going(tmp_path)
    folder.append_rows("alarms.jsonl", [ALARM])
    watched = Watched(folder.path)
    lines = [line.text for line in screen(watched, height=24)]
    assert len(lines) <= 24
    assert any("drift" in line for line in lines)
    assert any("sample 1" in line for line in lines)


def test_without_a_terminal_it_shows_one_plain_snapshot_and_loads_no_torch(tmp_path: Path) -> None:
    folder = going(tmp_path)
    code = (
        "import sys; sys.argv = ['gadfly', 'watch', sys.argv[1]]\n"
        "from gadfly.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder.path],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=True,
    )
    assert done.stdout.rstrip().endswith("set()")
    assert "120 of 480 steps" in done.stdout
    assert "\x1b" not in done.stdout


def seen_on_a_terminal(folder: Path, until: str, *, leave: bool) -> tuple[str, int]:
    """What `gadfly watch` draws on a terminal, and its exit code; `leave` presses Ctrl-C."""
    main, other = pty.openpty()
    process = subprocess.Popen(
        command(folder), stdin=other, stdout=other, stderr=other, env=environment(), start_new_session=True
    )
    os.close(other)
    drawn, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([main], [], [], 0.2)[0]:
            try:
                drawn += os.read(main, 1 << 16)
            except OSError:
                break
        if leave and until.encode() in drawn:
            leave = False
            process.send_signal(signal.SIGINT)
        if process.poll() is not None and not select.select([main], [], [], 0.0)[0]:
            break
    os.close(main)
    return drawn.decode(errors="replace"), process.wait(timeout=10)


def test_on_a_terminal_it_stays_until_it_is_left(tmp_path: Path) -> None:
    folder = going(tmp_path)
    drawn, code = seen_on_a_terminal(folder.path, "min left", leave=True)
    assert code == 0
    assert "\x1b[?1049h" in drawn, "a screen of its own"
    assert "run the same command" not in drawn
    assert drawn.rstrip().splitlines()[-1].strip().startswith("sample")


def test_a_run_that_has_ended_is_shown_once(tmp_path: Path) -> None:
    folder = a_run(tmp_path).folder
    for stage in ("seqkd", "gad"):
        folder.write_json(f"{stage}/stage.json", {"settings": {}, "done": True})
    drawn, code = seen_on_a_terminal(folder.path, "", leave=False)
    assert code == 0
    assert "done, 120 steps" in drawn
