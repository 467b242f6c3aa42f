"""That every benchmark runs, at tiny sizes: what it finds is for `python -m benchmarks`, not for a test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, main
from benchmarks.subjects import DEMO, MIDDLE, SMOLLM2, Shape, Size, new_model
from benchmarks.token_counts import Work, repeated, shared, student_bound

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


def test_work_is_what_a_slow_loop_over_tokens_counts() -> None:
    shape = Shape(prompts=2, group_size=3, prompt_tokens=5, response_tokens=4)
    prompt = [list(range(place + 1)) for place in range(5)]
    # A response sees all of the prompt, and itself up to each token.
    response = [list(range(5 + place + 1)) for place in range(4)]
    seen = [sum(map(len, part)) for part in (prompt, response)]
    assert shared(shape, 3) == Work(2 * (5 + 3 * 4), 2 * (seen[0] + 3 * seen[1]))
    assert repeated(shape, 3) == Work(2 * 3 * (5 + 4), 2 * 3 * sum(seen))


@pytest.mark.parametrize("size", [DEMO, MIDDLE, SMOLLM2], ids=["demo", "middle", "smollm2"])
def test_multiplications_of_a_token_are_the_weights_of_a_layer(size: Size) -> None:
    layer = new_model(size, shares_prompts=False).model.layers[0]
    weights = sum(weight.numel() for name, weight in layer.named_parameters() if name.endswith("proj.weight"))
    assert Work(1, 0).products(size) == weights


def test_attention_lowers_the_bound_of_long_prompts_and_is_worked_by_hand() -> None:
    shape = Shape(prompts=1, group_size=2, prompt_tokens=3, response_tokens=1)
    size = Size(hidden=2, intermediate=1, layers=1, heads=1, key_heads=1, vocabulary=4)
    # 22 multiplications a token, 4 a pair: 8 tokens and 20 pairs against 5 and 6 + 2 x 4.
    assert student_bound(shape) == 8 / 5
    assert student_bound(shape, size) == (8 * 22 + 20 * 4) / (5 * 22 + 14 * 4)
