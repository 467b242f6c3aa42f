"""That every benchmark runs, at tiny sizes: what it finds is for `python -m benchmarks`, not for a test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, main

FOLDER = Path(__file__).resolve().parents[1]


def test_every_benchmark_runs_and_prints_finite_ratios_as_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json"], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert list(dict.fromkeys(result["bench"].partition(":")[0] for result in results)) == list(NAMES)
    for result in results:
        assert {"bench", "ratio", "low", "high", "wanted"} <= result.keys()
        assert all(math.isfinite(result[key]) for key in ("ratio", "low", "high", "wanted"))
        assert result["low"] <= result["ratio"] <= result["high"]


def test_one_case_of_a_benchmark_is_named_after_a_colon(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "memory:50k"]) == 0
    assert capsys.readouterr().out.startswith("memory:50k: ")


@pytest.mark.parametrize(
    ("name", "error"),
    [("stepp", "no benchmark stepp; there are step, "), ("memory:1k", "no case 1k of memory")],
)
def test_an_unknown_name_is_refused(name: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", name])
    assert error in capsys.readouterr().err
