"""The stages with odd data and settings: a right result, or one clear line."""

import gc
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from torch import Tensor
from transformers import PreTrainedModel

from gadfly.checkpoint import latest_checkpoint
from gadfly.discriminator import new_discriminator, read_scores
from gadfly.engine import Engine
from gadfly.errors import CheckpointError, ConfigError, DataError, RunFolderError, UserError
from gadfly.groups import Branch, Group
from gadfly.losses import group_advantages
from gadfly.recipe_file import load_recipe
from gadfly.records import Message
from gadfly.samplers import LocalSampler
from gadfly.stages import sampler_choice
from gadfly.stages.diagnostics import discriminator_metrics, student_scores
from gadfly.stages.gad import gad
from gadfly.stages.generate import generate
from gadfly.stages.named_models import named_models
from gadfly.stages.pipeline import run_stages
from gadfly.stages.run import Run, open_run
from gadfly.stages.sft import seqkd, seqkd_equal_time
from gadfly.stages.warmup import warmup


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_may_have_different_numbers_of_teacher_responses(recipe_file: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "responses": ["ok"] * (1 + n % 3)} for n in range(24)]
    data = write_rows(tmp_path / "k.jsonl", rows)
    with open_run(load_recipe(recipe_file, [f"data.train={data}"])) as run:
        warmup(run)
        gad(run)
        steps = [row for row in run.folder.rows("metrics.jsonl") if "student/kl_nats" in row]
    assert len(steps) == run.recipe.gad.max_steps


def test_the_other_loss_and_the_other_way_of_reading_run(recipe_file: Path) -> None:
    settings = ["discriminator.loss=cross_entropy", "discriminator.reads=tokens"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        gad(run)
        first = next(row for row in run.folder.rows("metrics.jsonl") if "discriminator/loss" in row)
    assert first["discriminator/loss"] == pytest.approx(2 * 0.6931, abs=0.2)


def test_a_cap_that_leaves_no_text_is_survived(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, ["sampling.max_response_tokens=1"])) as run:
        warmup(run)
        gad(run)
        assert run.folder.is_done("gad")


def test_what_does_not_fit_is_listed_with_its_line(recipe_file: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "response": "ok"} for n in range(20)]
    rows[2]["prompt"] = "long " * 40
    rows[4]["response"] = "long " * 40
    data = write_rows(tmp_path / "long.jsonl", rows)
    settings = [
        f"data.train={data}",
        f"data.valid={data}",
        "sampling.max_prompt_tokens=100",
        "data.over_long_responses=drop",
    ]
    with open_run(load_recipe(recipe_file, settings)) as run:
        seqkd(run)
        bad = [
            (row["line"], row["reason"]) for row in run.folder.rows("bad_rows.jsonl") if row["set"] == "train"
        ]
        summary = run.folder.read_json("summary.json")["data"]["train"]
    assert bad == [(3, "over-long-prompt"), (5, "over-long-response")]
    assert summary == {"rows": 18, "bad": {"over-long-prompt": 1, "over-long-response": 1}}


def test_an_unfinished_response_over_the_cap_is_over_long_too(recipe_file: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "response": "ok", "finish_reason": "length"} for n in range(20)]
    rows[4]["response"] = "long " * 40
    data = write_rows(tmp_path / "cut.jsonl", rows)
    settings = [f"data.train={data}", "data.over_long_responses=drop"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        seqkd(run)
        bad = [(row["line"], row["reason"]) for row in run.folder.rows("bad_rows.jsonl")]
    assert (5, "over-long-response") in bad
    assert len([reason for _, reason in bad if reason == "over-long-response"]) == 1


@pytest.mark.parametrize(("role", "stage"), [("student", seqkd), ("discriminator", warmup)])
def test_held_out_prompts_that_a_model_cannot_attend_to_are_refused_by_its_role(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, role: str, stage: Callable[[Run], None]
) -> None:
    short = tmp_path / "short"
    shutil.copytree(tiny_model, short)
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 80}), encoding="utf-8")
    held_out = write_rows(tmp_path / "valid.jsonl", [{"prompt": "long " * 14, "response": "ok"}])
    settings = [f"{role}.model={short}", f"data.valid={held_out}"]
    refusal = rf"a prompt of \d+ tokens and a response of 12 exceed the {role}'s 80 positions"
    with open_run(load_recipe(recipe_file, settings)) as run, pytest.raises(UserError, match=refusal):
        stage(run)


def test_a_set_of_which_nothing_fits_is_an_error(recipe_file: Path) -> None:
    settings = ["sampling.max_prompt_tokens=1"]
    with open_run(load_recipe(recipe_file, settings)) as run, pytest.raises(DataError, match="none of"):
        seqkd(run)


def test_a_prompt_and_a_response_beyond_the_models_context_are_refused(recipe_file: Path) -> None:
    with (
        open_run(load_recipe(recipe_file, ["sampling.max_response_tokens=600"])) as run,
        pytest.raises(UserError, match="512 positions"),
    ):
        seqkd(run)


def test_lengths_at_which_a_model_turns_positions_otherwise_are_refused(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "longrope")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 50,
        "factor": 512 / 50,
        **factors,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = [f"student.model={folder}", "sampling.max_response_tokens=40"]
    with (
        open_run(load_recipe(recipe_file, settings)) as run,
        pytest.raises(UserError, match="50 positions"),
    ):
        seqkd(run)


def test_no_model_outlives_its_stage(recipe_file: Path) -> None:
    def models() -> list[PreTrainedModel]:
        return [thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel)]

    gc.collect()
    before = len(models())
    # Whatever refers to itself stays until somebody looks for it.
    gc.disable()
    try:
        with open_run(load_recipe(recipe_file, ["engine.activation_checkpointing=true"])) as run:
            warmup(run)
        assert len(models()) == before
    finally:
        gc.enable()


def test_supervised_steps_hand_no_weights_to_the_sampler(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[str] = []

    class Counting(LocalSampler):
        stage = ""

        def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            handed.append(self.stage)
            super().update(weights)

    monkeypatch.setattr(sampler_choice, "LocalSampler", Counting)
    with open_run(load_recipe(recipe_file, ["seqkd.evaluate_every=3", "seqkd.max_steps=6"])) as run:
        Counting.stage = "seqkd"
        seqkd(run)
        Counting.stage = "warmup"
        warmup(run)
        moved = [
            row
            for row in run.folder.rows("metrics.jsonl")
            if row["stage"] == "warmup" and "student/loss" in row
        ]
    # At the evaluations after steps 3 and 6; none before the first step, when the sampler has the weights.
    assert handed.count("seqkd") == 2
    # After every step of the student there, for the next rollout or the last evaluation, and no more.
    assert handed.count("warmup") == len(moved)


@pytest.mark.parametrize("lost", [0.0, 50.0])
@pytest.mark.parametrize("opening", [0.0, 100.0])
def test_the_equal_time_baseline_takes_as_long_and_keeps_its_number_of_steps(
    recipe_file: Path, opening: float, lost: float
) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        for stage in (seqkd, warmup, gad):
            stage(run)
        stages = run.folder.read_json("summary.json")["stages"]
        # What it takes to open a stage says nothing of its pace.
        longer = {
            name: stages[name] | {"seconds": stages[name]["seconds"] + opening} for name in ("seqkd", "gad")
        }
        if lost:
            # What gad had done before it went back to an earlier step.
            longer["gad"]["lost_seconds"] = lost
        run.folder.update_summary("stages", longer)
        seqkd_equal_time(run)
        plan = run.folder.read_json("seqkd-equal-time/plan.json")
        done = run.folder.read_json("summary.json")["stages"]["seqkd-equal-time"]["steps"]
        rows = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "seqkd"]
    first, *_, last = (row["time/unix"] for row in rows if "time/step_seconds" in row)
    pace = (last - first) / (stages["seqkd"]["steps"] - 1)
    left = stages["warmup"]["seconds"] + stages["gad"]["seconds"] + lost - stages["seqkd"]["seconds"]
    assert plan["steps"] == done == max(1, stages["seqkd"]["steps"] + round(left / pace))


def test_a_pause_of_seqkd_is_no_part_of_its_pace(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        for stage in (seqkd, warmup, gad):
            stage(run)
        rows = run.folder.rows("metrics.jsonl")
        # It went on a day later.
        paused = [
            row | {"time/unix": row["time/unix"] + 86400 * (row["stage"] == "seqkd" and row["step"] > 3)}
            for row in rows
        ]
        run.folder.write_rows("metrics.jsonl", paused)
        stages = run.folder.read_json("summary.json")["stages"]
        seqkd_equal_time(run)
        plan = run.folder.read_json("seqkd-equal-time/plan.json")
    steps = [row for row in rows if row["stage"] == "seqkd" and "time/step_seconds" in row]
    seconds = [row["time/step_seconds"] for row in steps]
    pace = sum(seconds) / len(seconds)
    left = stages["warmup"]["seconds"] + stages["gad"]["seconds"] - stages["seqkd"]["seconds"]
    assert plan["steps"] == max(1, stages["seqkd"]["steps"] + round(left / pace))


def test_after_gad_was_trained_again_the_equal_time_baseline_says_it_has_to_be_too(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        for stage in (seqkd, warmup, gad, seqkd_equal_time):
            stage(run)
        folder = run.folder.stage("seqkd-equal-time")
        shutil.rmtree(run.folder.stage("gad"))
    with open_run(load_recipe(recipe_file, ["gad.max_steps=2"])) as run:
        gad(run)
        with pytest.raises(RunFolderError, match="trained again since") as refusal:
            seqkd_equal_time(run)
        assert "delete that folder and run the same command again" in str(refusal.value)
        assert str(refusal.value).startswith(f"{folder}: ")
        shutil.rmtree(folder)
        seqkd_equal_time(run)
        assert run.folder.is_done("seqkd-equal-time")


def test_gad_goes_back_to_the_same_step_again_once_it_was_run_without_going_back(
    recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = recipe_file.parent / "runs" / "tiny" / "gad" / "step-000006"

    def trains_again(*overrides: str) -> bool:
        before = last.stat().st_ctime_ns if last.exists() else None
        with open_run(load_recipe(recipe_file, overrides)) as run:
            gad(run)
        return last.stat().st_ctime_ns != before

    with open_run(load_recipe(recipe_file)) as run:
        warmup(run)
    assert trains_again()
    assert trains_again("gad.start_from=4")
    caplog.set_level("INFO", "gadfly")
    assert not trains_again("gad.start_from=4")
    assert "to go back again, run it once without gad.start_from first" in caplog.text
    assert not trains_again()
    assert trains_again("gad.start_from=4")


def test_checkpoints_written_in_the_background_are_the_same(recipe_file: Path, tmp_path: Path) -> None:
    for name, background in (("at-once", "false"), ("background", "true")):
        options = [f"run_folder={tmp_path / name}", f"checkpoints.in_background={background}"]
        with open_run(load_recipe(recipe_file, options)) as run:
            warmup(run)
    one, other = (tmp_path / name / "warmup" for name in ("at-once", "background"))
    assert {path.name for path in other.glob("*")} == {path.name for path in one.glob("*")}
    for file in one.glob("step-*/*/*.safetensors"):
        assert (other / file.relative_to(one)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["generate.checkpoints=['seqdk']"], r"^generate.checkpoints: 'seqdk' is neither a stage nor in "),
        (
            ["generate.checkpoints=['gad/stp-4']"],
            r"^generate.checkpoints: 'gad/stp-4': of a stage there are ",
        ),
        (
            ["generate.checkpoints=['gad', 'seqkd-equal-time']"],
            r"^generate.checkpoints: 'seqkd-equal-time' will not be there, as seqkd.equal_time is false; ",
        ),
        (
            ["generate.checkpoints=['discriminator-lm/latest']"],
            r"^generate.checkpoints: 'discriminator-lm/latest' will not be there, as discriminator.lm_steps ",
        ),
        (["checkpoints.best_by=score"], r'^judge.model: must be given to judge by "score" \(judge.method, '),
        (["judge.method=['tell', 'pairwise']"], "^judge.model: must be given"),
        (
            ["judge.method=score", "judge.model=m"],
            "^judge.api_key_env: the environment variable OPENAI_API_KEY",
        ),
        (
            ["judge.method=score", "judge.model=m", "judge.api_key_env=''", "judge.score_prompt=nowhere.txt"],
            "nowhere.txt: no such judge prompt",
        ),
    ],
)
def test_what_would_end_a_run_after_its_training_ends_it_before(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with open_run(load_recipe(recipe_file, settings)) as run:
        with pytest.raises(ConfigError, match=message):
            run_stages(run)
        assert not list(run.folder.path.glob("*/stage.json"))


def test_a_run_whose_gad_begins_elsewhere_has_no_warmup_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        warmup(run)
        start = run.folder.stage("warmup") / "latest"
    settings = [f"gad.start_from={start}", f"run_folder={tmp_path / 'other'}", "seqkd.equal_time=true"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        run_stages(run)
        summary = run.folder.read_json("summary.json")
        assert sorted(summary["stages"]) == ["gad", "seqkd", "seqkd-equal-time"]
        plan = run.folder.read_json("seqkd-equal-time/plan.json")
    assert plan["seconds"] == summary["stages"]["gad"]["seconds"]
    assert not (tmp_path / "other" / "audit-warmup.json").exists()


def test_without_seqkd_the_equal_time_baseline_says_what_it_needs(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file)) as run, pytest.raises(CheckpointError, match="seqkd"):
        seqkd_equal_time(run)


def test_a_stage_whose_checkpoints_were_deleted_is_done_again(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        warmup(run)
        for path in run.folder.stage("warmup").glob("step-*"):
            path.rename(run.folder.path / path.name)
        assert not run.folder.is_done("warmup")
        warmup(run)
        assert run.folder.is_done("warmup")


def test_a_damaged_probe_is_named(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, ["gad.max_steps=2"])) as run:
        warmup(run)
        gad(run)
        (run.folder.path / "gad" / "probe.jsonl").write_text("{\n", encoding="utf-8")
        stage = run.folder.read_json("gad/stage.json")
        run.folder.write_json("gad/stage.json", {**stage, "done": False})
        with pytest.raises(RunFolderError, match=r"probe\.jsonl: damaged"):
            gad(run)


def test_two_models_of_one_name_are_refused_and_folders_have_their_own(
    recipe_file: Path, tiny_model: Path
) -> None:
    with open_run(load_recipe(recipe_file, [f'generate.checkpoints=["base", "{tiny_model}"]'])) as run:
        generate(run)
        arms = list(run.folder.read_json("summary.json")["evaluation"])
    assert arms == ["base", "teacher", "/".join(tiny_model.parts[-3:])]
    with (
        open_run(load_recipe(recipe_file, ['generate.checkpoints=["base", "base"]'])) as run,
        pytest.raises(ConfigError, match="base is named twice"),
    ):
        generate(run)


def test_what_is_generated_already_is_not_generated_again(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, ['generate.checkpoints=["base"]'])) as run:
        generate(run)
        file = run.folder.path / "generations" / "same.jsonl"
        before = file.stat().st_mtime_ns
        generate(run)
        assert file.stat().st_mtime_ns == before
    settings = ['generate.checkpoints=["base"]', "generate.max_response_tokens=3"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        generate(run)
        rows = run.folder.rows("generations/same.jsonl")
    assert len(rows) == 40
    assert file.stat().st_mtime_ns != before


def test_figures_of_other_settings_leave_the_table_until_they_are_made_anew(
    recipe_file: Path, tiny_model: Path
) -> None:
    other = "/".join(tiny_model.parts[-3:])

    def evaluated(*settings: str) -> dict[str, Any]:
        with open_run(load_recipe(recipe_file, settings)) as run:
            generate(run)
            evaluation = run.folder.read_json("summary.json")["evaluation"]
            return {arm: sets["same"] for arm, sets in evaluation.items() if sets}

    both, alone = f'generate.checkpoints=["base", "{tiny_model}"]', 'generate.checkpoints=["base"]'
    first = evaluated(both)
    assert evaluated(alone) == first
    assert set(evaluated(alone, "generate.max_response_tokens=3")) == {"base", "teacher"}
    assert set(evaluated(both, "generate.max_response_tokens=3")) == {"base", "teacher", other}
    assert evaluated(both) == first


def test_the_same_step_of_two_runs_has_two_names(recipe_file: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        with open_run(load_recipe(recipe_file, [f"run_folder={tmp_path / name}"])) as run:
            warmup(run)
            checkpoint = latest_checkpoint(run.folder.stage("warmup"))
            assert checkpoint is not None
            step = checkpoint.path.name
    places = [str(tmp_path / name / "warmup" / step) for name in ("one", "other")]
    settings = [f"run_folder={tmp_path / 'one'}", f"generate.checkpoints={json.dumps(places)}"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        assert [model.name for model in named_models(run)] == [f"warmup/{step}", f"other/warmup/{step}"]


def test_a_slip_in_a_setting_that_stopped_the_stage_at_once_can_be_put_right(recipe_file: Path) -> None:
    with (
        open_run(load_recipe(recipe_file, ["sampling.max_response_tokens=600"])) as run,
        pytest.raises(UserError, match="512 positions"),
    ):
        seqkd(run)
    with open_run(load_recipe(recipe_file)) as run:
        seqkd(run)
        assert run.folder.is_done("seqkd")


def test_copies_of_a_sample_have_one_score_and_no_advantage_in_single_precision(stories: Path) -> None:
    model, renderer = new_discriminator(str(stories), "float32", seed=0)
    with torch.no_grad():
        model.score_head.weight.mul_(150)
    engine = Engine(model, read_scores, micro_batch_tokens=4096)
    groups = []
    for number in range(20):
        tokens = tuple(renderer.response_tokens(f"Once upon a time there were {number} dogs." * 2, True))
        copy = Branch(tokens, True, "")
        prompt = tuple(renderer.prompt_tokens([Message("user", f"story {number}")]))
        groups.append(Group(str(number), prompt, teachers=(copy,), students=(copy,) * 8))
    scores = engine.forward(groups)
    assert discriminator_metrics(scores, groups)["discriminator/accuracy"] == 0.5
    assert torch.equal(group_advantages(student_scores(scores, groups)), torch.zeros(20, 8))


@pytest.fixture
def stories() -> Path:
    folder = SHARED / "models" / "stories260k"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    return folder
