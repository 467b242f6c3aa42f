"""What an audit says that a run will take, where it can be worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
from audits import recipe, rows
from transformers import AutoModelForCausalLM

from gadfly.recipe_file import load_recipe
from gadfly.stages.audit import audit
from gadfly.stages.audit.estimate import Pace, estimate
from gadfly.stages.run import open_run

# A token a second, answers alone: seconds are tokens.
PACE = Pace(sampled=1.0, read=1.0, prompt_tokens=0.0, teacher_tokens=10.0, student_tokens=0.0)


def estimated(folder: Path, model: Path, answers: int, *settings: str) -> dict[str, Any]:
    made = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "responses": [f"{row['response']} {k}" for k in range(answers)],
        }
        for row in rows(0, 16)
    ]
    folder.mkdir()
    with open_run(load_recipe(recipe(folder, model, made), settings)) as run:
        return estimate(run, PACE)


def test_k_answers_to_a_prompt_take_k_times_the_reading(tmp_path: Path, tiny_model: Path) -> None:
    settings = ("seqkd.max_steps=5", "seqkd.batch_prompts=4")
    one, three = (estimated(tmp_path / str(k), tiny_model, k, *settings) for k in (1, 3))
    # Each token three times: forward, and twice that backward.
    assert one["seconds"]["seqkd"] == 5 * 4 * 3 * 10
    assert three["seconds"]["seqkd"] == 3 * one["seconds"]["seqkd"]


def test_checkpoints_of_the_discriminators_language_model_need_disk(tmp_path: Path, tiny_model: Path) -> None:
    settings = ("checkpoints.keep_last=3", "checkpoints.keep_best=false")
    without = estimated(tmp_path / "without", tiny_model, 1, *settings)
    with_it = estimated(tmp_path / "with", tiny_model, 1, *settings, "discriminator.lm_steps=5")
    parameters = AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    # Three kept, each of weights and AdamW's two moments in 32 bits.
    assert with_it["disk_bytes"] - without["disk_bytes"] == pytest.approx(3 * parameters * 12, rel=0.01)
    # The 16 prompts are fewer than a batch.
    assert with_it["seconds"]["discriminator-lm"] == 5 * 16 * 3 * 10


def test_what_does_not_fit_is_looked_at_again_with_the_settings_of_now(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe(tmp_path, tiny_model, rows(0, 40))

    def audited(*settings: str) -> tuple[dict[str, Any], set[str]]:
        with open_run(load_recipe(path, settings)) as run:
            audit(run)
            looked = run.folder.read_json("audit.json")["audit"]
        return looked, {
            f["evidence"].split(":")[0] for f in looked["findings"] if f["name"] == "does-not-fit"
        }

    fits, nothing = audited()
    assert not nothing
    assert "does-not-fit" not in caplog.text
    # A million checkpoints are kept of each stage.
    overfull, missing = audited("checkpoints.keep_last=1000000")
    assert missing == {"disk"}
    assert overfull["pace"] == fits["pace"], "nothing was sampled again"
    assert "audit: does-not-fit (warning)" in caplog.text, "it is told, though all else was looked at before"
    again, nothing = audited()
    assert not nothing
    assert again["estimate"]["disk_bytes"] == fits["estimate"]["disk_bytes"]
    assert again["findings"] == fits["findings"]


def test_an_audit_that_finds_nothing_new_leaves_its_file_alone(tmp_path: Path, tiny_model: Path) -> None:
    path = recipe(tmp_path, tiny_model, rows(0, 40))
    written = []
    for _ in range(2):
        with open_run(load_recipe(path, [])) as run:
            audit(run)
            written.append((run.folder.path / "audit.json").stat())
    assert (written[0].st_ino, written[0].st_mtime_ns) == (written[1].st_ino, written[1].st_mtime_ns)
