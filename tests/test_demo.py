"""The first command a user runs, shortened: every stage, and the table at the end."""

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"

SHORT = (
    "discriminator.lm_steps=8",
    "seqkd.max_steps=8",
    "warmup.max_steps=8",
    "warmup.discriminator_final_steps=2",
    "gad.max_steps=2",
    "engine.num_threads=1",
)
MODELS = ("base", "seqkd", "seqkd-equal-time", "discriminator-lm", "warmup", "gad")


def test_the_demo_prints_a_row_for_every_model_and_none_for_the_teacher(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gadfly", "demo", str(tmp_path / "demo"), *SHORT],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    table = [line.split()[0] for line in done.stdout.splitlines()]
    assert table[0] == "model"
    assert sorted(table[1:7]) == sorted(MODELS)
    assert table[7:] == ["In", "report:"]
    assert (tmp_path / "demo" / "report.html").exists()
