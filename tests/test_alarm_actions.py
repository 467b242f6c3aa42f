"""What alarms do to a run: warn, let the discriminator rest, stop, go back and on with a remedy."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from drifting import STEPS, breaking, drifting

from experiments.faults.wrapped import spoiled_gradient
from gadfly.alarms import ALARMS, Alarm, Circumstances, Kind
from gadfly.checkpoint import checkpoint_steps
from gadfly.config import TRAINING_STAGES
from gadfly.errors import AlarmError
from gadfly.metrics import without_time
from gadfly.recipe_file import load_recipe
from gadfly.run_folder import RunFolder
from gadfly.stages import alarm_actions
from gadfly.stages.alarm_actions import StageAlarms
from gadfly.stages.gad import gad
from gadfly.stages.remedies import remedy_for
from gadfly.stages.run import open_run
from gadfly.stages.sft import seqkd
from gadfly.stages.warmup import warmup
from gadfly.stages.watch.screen import snapshot
from gadfly.stages.watch.watched import Watched

TESTS = Path(__file__).resolve().parent
SETTINGS = ("gad.save_every=5", "checkpoints.keep_last=20")
# The tiny student never learns to end, so this alarm is due in its gad stage.
SOON = ("alarms.window=8",)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))}


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on how often a run was stopped."""
    run = RunFolder(folder)
    return {
        "metrics": [without_time(row) for row in run.rows("metrics.jsonl")],
        "alarms": run.rows("alarms.jsonl"),
        "remedies": [without_time(row) for row in run.rows("gad/remedies.jsonl")],
        "kept": checkpoint_steps(folder / "gad"),
        "stage": {**run.read_json("gad/stage.json"), "seconds": None, "lost_seconds": None},
        "weights": [path.read_bytes() for path in sorted((folder / "gad").glob("step-*/student/kl.txt"))],
    }


def drift(recipe: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    with open_run(load_recipe(recipe, [f"run_folder={folder}", *SETTINGS, *overrides])) as run:
        drifting(run)
    return outcome(folder)


def test_a_warning_is_written_and_the_run_goes_on(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = drift(recipe_file, tmp_path / "run")
    (alarm, *more) = [row for row in found["alarms"] if row["name"] == "drift"]
    assert more == []
    assert (alarm["stage"], alarm["action"]) == ("gad", "warn")
    assert 30 < alarm["step"] < 45
    assert "1." in alarm["evidence"]
    assert alarm["cause"]
    assert "gad.kl_coefficient" in alarm["advice"]
    assert found["stage"]["done"]
    assert f"gad step {alarm['step']}: alarm drift (warn): The student drifts away: KL" in caplog.text


def test_the_discriminator_rests_while_the_alarm_stands(recipe_file: Path, tmp_path: Path) -> None:
    found = drift(recipe_file, tmp_path / "run", "alarms.action=skip_discriminator")
    (alarm,) = [row for row in found["alarms"] if row["name"] == "too-strong"]
    rests = [row["step"] for row in found["metrics"] if row["detail/discriminator_skipped"]]
    assert alarm["action"] == "skip_discriminator"
    assert rests == list(range(alarm["step"] + 1, rests[-1] + 1))
    assert 45 <= rests[-1] < STEPS
    # Resting does nothing about a student that drifts.
    assert [row["action"] for row in found["alarms"] if row["name"] == "drift"] == ["warn"]


def test_a_stop_keeps_a_checkpoint_and_stays_one_until_the_recipe_says_otherwise(
    recipe_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(AlarmError, match=r"^gad step \d+: alarm drift \(stop\): .*alarms.actions.drift"):
        drift(recipe_file, folder, "alarms.actions.drift=stop")
    stopped = outcome(folder)
    step = stopped["alarms"][-1]["step"]
    assert stopped["kept"][-1] == step == stopped["metrics"][-1]["step"]
    assert not stopped["stage"]["done"]
    with pytest.raises(AlarmError, match=rf"^gad step {step}: alarm drift"):
        drift(recipe_file, folder, "alarms.actions.drift=stop")
    assert outcome(folder) == stopped
    went_on = drift(recipe_file, folder)
    assert went_on["stage"]["done"]
    assert went_on["metrics"] == drift(recipe_file, tmp_path / "never-stopped")["metrics"]


def test_a_stage_goes_back_and_on_with_the_remedy(recipe_file: Path, tmp_path: Path) -> None:
    found = drift(recipe_file, tmp_path / "run", "alarms.actions.drift=roll_back")
    (remedy,) = found["remedies"]
    assert remedy["changes"] == {"gad.kl_coefficient": 0.01, "gad.learning_rate": 5e-4}
    assert remedy["back_to"] < remedy["since"] <= remedy["step"]
    assert remedy["back_to"] == 5 * ((remedy["since"] - 1) // 5)
    steps = [row["step"] for row in found["metrics"]]
    assert steps == list(range(1, STEPS + 1))
    assert found["metrics"][-1]["student/kl_nats"] < 1.0
    assert found["stage"]["done"]
    assert not [row for row in found["alarms"] if row["name"] == "drift"]
    settings = found["stage"]["settings"]["gad"]
    assert settings["kl_coefficient"] == 0.001, "the stage is still that of the recipe"
    assert drift(recipe_file, tmp_path / "run", "alarms.actions.drift=roll_back") == found


def test_the_time_of_what_was_taken_back_is_counted_beside_that_of_what_is_kept(
    recipe_file: Path, tmp_path: Path
) -> None:
    began = time.perf_counter()
    drift(recipe_file, tmp_path / "run", "alarms.actions.drift=roll_back")
    whole = time.perf_counter() - began
    folder = RunFolder(tmp_path / "run")
    (remedy,) = folder.rows("gad/remedies.jsonl")
    times = folder.read_json("summary.json")["stages"]["gad"]
    assert times["lost_seconds"] == remedy["time/lost_seconds"]
    # That of the steps before the checkpoint it went back to is not lost.
    assert 0 < times["lost_seconds"] < remedy["time/seconds"]
    assert times["seconds"] + times["lost_seconds"] < whole
    drift(recipe_file, tmp_path / "warned")
    warned = RunFolder(tmp_path / "warned").read_json("summary.json")["stages"]["gad"]
    assert "lost_seconds" not in warned


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_a_warning_that_the_recipe_makes_more_of_is_acted_upon_at_the_next_step(
    action: str, recipe_file: Path, tmp_path: Path
) -> None:
    folder, settings = tmp_path / "run", f"alarms.actions.drift={action}"
    # Another alarm stops it, while this one stands and is a warning.
    with pytest.raises(AlarmError, match="alarm too-strong"):
        drift(recipe_file, folder, "alarms.actions.too-strong=stop")
    stopped = outcome(folder)
    assert "drift" in [row["name"] for row in stopped["alarms"]]
    if action == "stop":
        with pytest.raises(AlarmError, match=rf"^gad step {stopped['metrics'][-1]['step']}: alarm drift"):
            drift(recipe_file, folder, settings)
        return
    found = drift(recipe_file, folder, settings)
    # To before it was first said, so that the remedy is tried on rows without the fault.
    (remedy,) = found["remedies"]
    assert remedy["step"] == stopped["metrics"][-1]["step"] + 1
    assert found["stage"]["done"]
    assert found["metrics"] == drift(recipe_file, tmp_path / "at-once", settings)["metrics"]


def test_what_a_stage_went_back_for_stands_in_its_remedies_and_on_the_screen(
    recipe_file: Path, tmp_path: Path
) -> None:
    found = drift(recipe_file, tmp_path / "run", "alarms.actions.drift=roll_back")
    (remedy,) = found["remedies"]
    assert remedy["evidence"].startswith("KL to the student after warmup 1.")
    assert remedy["cause"]
    assert "gad.kl_coefficient" in remedy["advice"]
    screen = snapshot(Watched(tmp_path / "run"))
    assert f"gad from step {remedy['step']} to {remedy['back_to']} for drift" in screen
    assert remedy["evidence"] in screen


def test_without_a_good_checkpoint_it_goes_back_to_the_start(recipe_file: Path, tmp_path: Path) -> None:
    settings = ("alarms.actions.drift=roll_back", "checkpoints.keep_last=1", "checkpoints.keep_best=false")
    found = drift(recipe_file, tmp_path / "run", *settings)
    assert found["remedies"][0]["back_to"] == 0
    assert [row["step"] for row in found["metrics"]] == list(range(1, STEPS + 1))
    assert max(row["student/kl_nats"] for row in found["metrics"]) < 0.2


def test_after_going_back_three_times_it_stops(recipe_file: Path, tmp_path: Path) -> None:
    # Nothing holds this one: each remedy is too weak.
    settings = ("gad.kl_coefficient=1e-9", "alarms.actions.too-strong=roll_back")
    with pytest.raises(AlarmError, match=r"alarm too-strong \(stop\)"):
        drift(recipe_file, tmp_path / "run", *settings)
    found = outcome(tmp_path / "run")
    assert len(found["remedies"]) == 3
    rates = [row["changes"]["gad.discriminator_learning_rate"] for row in found["remedies"]]
    assert rates == [5e-4, 2.5e-4, 1.25e-4]
    assert found["kept"][-1] == found["alarms"][-1]["step"]


@pytest.mark.slow
def test_a_real_run_stops_with_its_exit_code_and_goes_on_when_told(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [f"run_folder={folder}", *SOON]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)

    def gad_again(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gadfly", "gad", str(recipe_file), *settings, *overrides]
        return subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=200, check=False
        )

    # It has no remedy, so going back would be in vain.
    for _ in range(2):
        stopped = gad_again("alarms.actions.ends-differ=roll_back")
        assert stopped.returncode == 4, stopped.stderr
        assert stopped.stderr.splitlines()[-1].startswith("gad step 4: alarm ends-differ (stop): ")
    assert checkpoint_steps(folder / "gad")[-1] == 4
    assert not RunFolder(folder).is_done("gad")
    went_on = gad_again()
    assert went_on.returncode == 0, went_on.stderr
    assert RunFolder(folder).is_done("gad")
    (alarm,) = [row for row in RunFolder(folder).rows("alarms.jsonl") if row["stage"] == "gad"]
    assert (alarm["name"], alarm["step"]) == ("ends-differ", 4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_clean_run_raises_none(recipe_file: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(5)
    words = ("ka", "lo", "mi", "ne", "su", "ta")
    rows = [
        {"prompt": f"say {n}", "response": "".join(rng.choice(words) for _ in range(3))} for n in range(160)
    ]
    data = tmp_path / "clean.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    learning = {
        "warmup.learning_rate": 1e-2,
        "warmup.batch_prompts": 32,
        "warmup.max_steps": 60,
        "warmup.discriminator_only_steps": 0,
        "warmup.discriminator_every": 0,
        "warmup.discriminator_final_steps": 30,
        "gad.learning_rate": 1e-4,
        "gad.discriminator_learning_rate": 3e-4,
        "gad.kl_coefficient": 0.1,
        "gad.batch_prompts": 16,
        "gad.max_steps": 24,
        "gad.evaluate_every": 10,
        "evaluation.prompts": 32,
    }
    settings = [f"{key}={value}" for key, value in learning.items()]
    settings += [f"run_folder={tmp_path / 'run'}", f"data.train={data}", f"seed={seed}", "alarms.window=10"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        gad(run)
        assert run.folder.rows("alarms.jsonl") == []
        assert any("detail/still_fraction/student" in row for row in run.folder.rows("metrics.jsonl"))


def test_a_loss_that_is_no_number_goes_back_too(recipe_file: Path, tmp_path: Path) -> None:
    def work(*overrides: str) -> dict[str, Any]:
        folder = tmp_path / "run"
        with open_run(load_recipe(recipe_file, [f"run_folder={folder}", *SETTINGS, *overrides])) as run:
            breaking(run)
        return outcome(folder)

    with pytest.raises(AlarmError) as stopped:
        work()
    message = str(stopped.value)
    assert message.startswith("gad step 33: the loss is nan (prompts p1); nothing was updated. Last good ")
    assert "checkpoint: step 30. The same command goes on from there, and may meet the same again" in message
    assert 'with alarms.actions.not-finite="roll_back" it does so at half the learning rates' in message
    assert "Other settings need another name: Lower gad.learning_rate" in message
    assert outcome(tmp_path / "run")["alarms"][-1]["name"] == "not-finite"
    found = work("alarms.action=roll_back", "alarms.actions.drift=warn", "alarms.actions.too-strong=warn")
    assert [row["name"] for row in found["remedies"]] == ["not-finite"]
    assert found["remedies"][0]["back_to"] == 30
    assert found["stage"]["done"]


def test_warmup_goes_back_to_its_start_although_its_language_model_has_no_remedies(recipe_file: Path) -> None:
    settings = ["discriminator.lm_steps=2", "warmup.max_steps=3", "alarms.actions.not-finite=roll_back"]
    rates: list[float] = []

    def rate_of(rate: float, *_: object) -> float:
        rates.append(rate)
        if len(rates) == 1:
            raise AlarmError("the loss is nan (prompts p1); nothing was updated")
        return rate

    with (
        patch("gadfly.stages.warmup.scheduled_learning_rate", rate_of),
        open_run(load_recipe(recipe_file, settings)) as run,
    ):
        warmup(run)
        (remedy,) = run.folder.rows("warmup/remedies.jsonl")
        assert run.folder.is_done("warmup")
    assert remedy["back_to"] == 0
    assert rates == [rates[0], *[rates[0] / 2] * 3]


def test_weights_that_an_update_has_broken_are_not_saved(recipe_file: Path) -> None:
    broken = (
        r"^gad step 1: student: weights are not finite after the update: .* Last good checkpoint: none yet"
    )
    with open_run(load_recipe(recipe_file, ["gad.save_every=1"])) as run:
        warmup(run)
        # A rate that single precision cannot hold.
        with (
            patch("gadfly.stages.gad.scheduled_learning_rate", lambda *_: 1e39),
            pytest.raises(AlarmError, match=broken),
        ):
            gad(run)
        assert not checkpoint_steps(run.folder.stage("gad"))


@pytest.mark.parametrize("delay", [0.0, 0.01])
def test_a_kill_while_going_back_changes_nothing(recipe_file: Path, tmp_path: Path, delay: float) -> None:
    undisturbed = drift(recipe_file, tmp_path / "undisturbed", "alarms.actions.drift=roll_back")
    folder = tmp_path / "killed"
    settings = [f"run_folder={folder}", *SETTINGS, "alarms.actions.drift=roll_back"]
    command = [sys.executable, str(TESTS / "drifting.py"), str(recipe_file), *settings]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (folder / "gad" / "remedies.jsonl").exists() and process.poll() is None:
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert (folder / "gad" / "remedies.jsonl").exists()
    drift(recipe_file, folder, "alarms.actions.drift=roll_back")
    assert outcome(folder) == undisturbed


def test_a_kill_between_the_note_and_the_way_back_is_made_up_for(recipe_file: Path, tmp_path: Path) -> None:
    undisturbed = drift(recipe_file, tmp_path / "run", "alarms.actions.drift=roll_back")
    # As it stood when the row was noted: all checkpoints of the drift are there still.
    warned = tmp_path / "noted"
    with pytest.raises(AlarmError):
        drift(recipe_file, warned, "alarms.actions.drift=stop")
    folder = RunFolder(warned)
    (noted,) = undisturbed["remedies"]
    folder.write_rows("gad/remedies.jsonl", [{**noted, "is_done": False}])
    assert max(checkpoint_steps(warned / "gad")) > noted["back_to"]
    assert drift(recipe_file, warned, "alarms.actions.drift=roll_back") == undisturbed


def test_a_resumed_run_raises_the_same_alarms(recipe_file: Path, tmp_path: Path) -> None:
    undisturbed = drift(recipe_file, tmp_path / "undisturbed")
    whole = tmp_path / "undisturbed"
    for step in (10, 35, 50):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(whole, folder, symlinks=True)
        for later in checkpoint_steps(folder / "gad"):
            if later > step:
                shutil.rmtree(folder / "gad" / f"step-{later:06d}")
        begun = RunFolder(folder).read_json("gad/stage.json")
        RunFolder(folder).write_json("gad/stage.json", {**begun, "done": False})
        assert drift(recipe_file, folder) == undisturbed


def test_a_kill_before_the_way_back_is_noted_changes_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A checkpoint is due at every step, so also at the one that is to be left behind.
    settings = ("alarms.actions.drift=roll_back", "gad.save_every=1", "checkpoints.keep_last=60")
    undisturbed = drift(recipe_file, tmp_path / "undisturbed", *settings)

    class Killed(BaseException):
        pass

    def fatal(*_: object) -> int:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(alarm_actions, "note_remedy", fatal)
        with pytest.raises(Killed):
            drift(recipe_file, tmp_path / "killed", *settings)
    assert RunFolder(tmp_path / "killed").rows("gad/remedies.jsonl") == []
    assert drift(recipe_file, tmp_path / "killed", *settings) == undisturbed
    assert len(undisturbed["remedies"]) == 1


def raised(kind: Kind, stage: str) -> Alarm:
    remedy = {key.format(stage=stage): change for key, change in kind.remedy.items()}
    return Alarm(kind.name, kind.title, 9, 9, "", kind.cause, kind.advice_in(stage), remedy)


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_a_remedy_changes_what_its_stage_reads_and_nothing_else(stage: str, recipe_file: Path) -> None:
    own = {
        "seqkd-equal-time": {"seqkd.equal_time_learning_rate"},
        "discriminator-lm": {"discriminator.lm_learning_rate"},
    }.get(stage, {f"{stage}.learning_rate"})
    reads = own | {"warmup": {"warmup.discriminator_learning_rate", "sampling.temperature"}}.get(stage, set())
    if stage == "gad":
        reads |= {"gad.kl_coefficient", "gad.discriminator_learning_rate", "sampling.temperature"}
    with open_run(load_recipe(recipe_file)) as run:
        for kind in ALARMS:
            if not kind.stages or stage in kind.stages:
                changes = remedy_for(run, stage, raised(kind, stage))
                assert changes.keys() <= reads
                assert changes or not kind.remedy, "it would do the same again"
        not_finite = remedy_for(run, stage, raised(ALARMS[0], stage))
    (rate,) = (not_finite[key] for key in own)
    assert rate == {"discriminator-lm": 0.5e-5}.get(stage, 0.5e-3)


def test_sft_goes_back_at_half_its_rate_when_a_gradient_is_no_number(
    recipe_file: Path, tmp_path: Path
) -> None:
    settings = [f"run_folder={tmp_path / 'run'}", "alarms.action=roll_back"]
    # The model that is opened after going back has fewer steps left than that.
    with spoiled_gradient(5), open_run(load_recipe(recipe_file, settings)) as run:
        seqkd(run)
        (remedy,) = run.folder.rows("seqkd/remedies.jsonl")
        assert run.folder.is_done("seqkd")
    assert (remedy["name"], remedy["step"], remedy["back_to"]) == ("not-finite", 5, 4)
    assert remedy["changes"] == {"seqkd.learning_rate": 5e-4}


def test_an_alarm_before_the_first_step_promises_no_checkpoint(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, ["alarms.action=stop"])) as run:
        alarms = StageAlarms(run, "gad", Circumstances())
        alarms.see({"stage": "gad", "step": 0, "evaluation/rouge_l": float("nan")})
        with pytest.raises(AlarmError) as stopped:
            alarms.act(before=lambda: None, seconds=0.0)
    assert "checkpoint" not in str(stopped.value)
    assert 'alarms.actions.not-finite="warn"' in str(stopped.value)
