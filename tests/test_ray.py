"""`gadfly run --ray-workers`: the same weights as one process, crashes begun again, user errors told once.

Ray is no part of the test environment; the slow tests here need `scripts/install dev,gguf,ray` before.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SOURCE = Path(__file__).resolve().parents[1] / "src"
SETTINGS = ("student.dtype=float64", "gad.max_steps=8")

HAS_RAY = importlib.util.find_spec("ray") is not None


def needs_ray(test: object) -> object:
    skip = pytest.mark.skipif(not HAS_RAY, reason="no Ray here: scripts/install dev,gguf,ray")
    return pytest.mark.slow(pytest.mark.timeout(600)(skip(test)))


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "gadfly", "run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": str(SOURCE)},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    output, errors = process.communicate(timeout=400)
    return process.returncode, output, errors


def wait_for_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not (folder / "gad" / "latest").exists():
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)


def workers(ancestor: int) -> set[int]:
    """Ray's workers that train, of all that a process has started."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True, timeout=20
    )
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    started, parents = set[int](), {ancestor}
    while parents:
        parents = {int(pid) for pid, parent, *_ in rows if int(parent) in parents}
        started |= parents
    return {int(pid) for pid, _, *title in rows if int(pid) in started and "TrainWorker" in "".join(title)}


def largest_difference(one: Path, other: Path) -> float:
    """Of any weight in any checkpoint of two runs."""
    largest = 0.0
    paths = sorted(one.rglob("model.safetensors"))
    assert len(paths) > 5
    for path in paths:
        mine, theirs = load_file(path), load_file(other / path.relative_to(one))
        assert mine.keys() == theirs.keys()
        gaps = [(weight - theirs[name]).double().abs().max().item() for name, weight in mine.items()]
        largest = max(largest, *gaps)
    return largest


@pytest.fixture
def undisturbed(tmp_path: Path, recipe_file: Path) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path / "one"
    code, _, errors = end(start(recipe_file, f"run_folder={folder}", *SETTINGS))
    assert code == 0, errors
    return folder


# Without Ray.


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_ray_that_is_not_installed_is_one_line(recipe_file: Path) -> None:
    code, output, errors = end(start(recipe_file, "--ray-workers", 2))
    assert (code, output) == (2, "")
    assert errors == "--ray-workers 2: Ray is not installed; pip install 'gadfly[ray]'\n"


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_workers_that_makes_no_sense_is_refused(number: str, recipe_file: Path) -> None:
    code, _, errors = end(start(recipe_file, f"--ray-workers={number}"))
    assert code == 2
    assert "--ray-workers" in errors
    assert "Traceback" not in errors


def test_a_mistake_in_the_recipe_is_told_before_ray_is_looked_for(recipe_file: Path) -> None:
    code, _, errors = end(start(recipe_file, "gad.group_sise=4", "--ray-workers", 2))
    assert code == 2
    assert errors == "command line: gad.group_sise: unknown key; did you mean 'group_size'?\n"


# With Ray.


@needs_ray
def test_two_workers_end_with_the_weights_of_one_process(
    tmp_path: Path, recipe_file: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "two"
    code, output, errors = end(start(recipe_file, f"run_folder={folder}", *SETTINGS, "--ray-workers", 2))
    assert code == 0, errors
    assert output == f"report: {folder / 'report.html'}\n"
    assert "gad 8/8" in errors, "the first worker's log"
    assert largest_difference(undisturbed, folder) < 1e-9
    assert "--ray-workers 2" in json.loads((folder / "environment.json").read_text())["command"]


@needs_ray
@pytest.mark.parametrize("victim", ["the first worker", "another"])
def test_a_run_whose_worker_is_killed_goes_on_to_the_same_weights(
    victim: str, tmp_path: Path, recipe_file: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "two"
    process = start(recipe_file, f"run_folder={folder}", *SETTINGS, "--ray-workers", 2)
    wait_for_checkpoint(folder)
    first = int((folder / ".lock").read_text())
    (other,) = workers(process.pid) - {first}
    os.kill(first if victim == "the first worker" else other, signal.SIGKILL)
    code, output, errors = end(process)
    assert code == 0, errors
    assert output == f"report: {folder / 'report.html'}\n"
    assert errors.count("workers: started again, 1 of 3 times\n") == 1
    assert "gad: going on after step" in errors
    assert largest_difference(undisturbed, folder) < 1e-9


@needs_ray
def test_a_user_error_in_a_worker_is_one_line_and_not_tried_again(tmp_path: Path, recipe_file: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "x"}\n')
    settings = [f"data.train={tmp_path / 'train.jsonl'}", "--ray-workers", "2"]
    code, output, errors = end(start(recipe_file, *settings))
    assert (code, output) == (2, "")
    assert errors.count("no usable row") == 1
    assert errors.splitlines()[-1].startswith(str(tmp_path / "train.jsonl"))
    assert "started again" not in errors
    assert "Traceback" not in errors


@needs_ray
@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_no_worker(
    request_to_end: signal.Signals, tmp_path: Path, recipe_file: Path
) -> None:
    folder = tmp_path / "two"
    process = start(recipe_file, f"run_folder={folder}", *SETTINGS, "--ray-workers", 2)
    wait_for_checkpoint(folder)
    started = workers(process.pid)
    assert len(started) == 2
    process.send_signal(request_to_end)
    code, output, errors = end(process)
    assert (code, output) == (128 + request_to_end, "")
    assert errors.splitlines()[-1] == "stopped; run the same command to go on"
    # A worker asked to end looks for lost ranks for some seconds before it does.
    deadline = time.monotonic() + 20
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"workers {left} are still there"
        time.sleep(0.2)
