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


def table_of(folder: Path, *settings: str) -> list[list[str]]:
    """What the command prints, line by line and word by word."""
    done = subprocess.run(
        [sys.executable, "-m", "gadfly", "demo", str(folder), *SHORT, *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_the_demo_prints_a_row_for_every_model_and_none_for_the_teacher(tmp_path: Path) -> None:
    sampled, whole = table_of(tmp_path / "demo", "generate.temperatures=[1.0]"), table_of(tmp_path / "demo")
    for table in (sampled, whole):
        assert table[0][0] == "model"
        assert sorted(row[0] for row in table[1:7]) == sorted(MODELS)
        assert [row[0] for row in table[7:]] == ["In", "report:"]
    assert {row[1] for row in sampled[1:7]} == {"-"}
    assert "-" not in {word for row in whole[1:7] for word in row}
    assert (tmp_path / "demo" / "report.html").exists()
