"""Alarms of a run on two processes: those of one, at its steps, said once; and what is done about them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from side_by_side import side_by_side
from torch import Tensor

from gadfly.checkpoint import checkpoint_steps
from gadfly.distributed.processes import Processes
from gadfly.engine import Engine
from gadfly.errors import AlarmError
from gadfly.metrics import without_time
from gadfly.models import load_language_model
from gadfly.recipe_file import load_recipe
from gadfly.run_folder import RunFolder
from gadfly.stages import roles
from gadfly.stages.gad import gad
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup

STEPS, SPOILED_AT = 15, 2
# At this rate the tiny student drifts away within steps, and is told apart for good.
EVENTFUL = (
    "student.dtype=float64",
    "gad.learning_rate=2e-1",
    "gad.kl_coefficient=0.03",
    f"gad.max_steps={STEPS}",
    "gad.evaluate_every=100",
    "checkpoints.keep_last=20",
    "engine.timeout_seconds=60",
    "alarms.window=8",
)
ACTED_UPON = ('alarms.action="skip_discriminator"', "alarms.actions.drift=roll_back")
# All samples of a group are one, which is said at the second step.
STOPPED = ("alarms.actions.copies=stop", "sampling.temperature=0.01")


def in_gad(processes: Processes, recipe: Path, folder: Path, *settings: str) -> str:
    """A run of gad; gives how it ended, as this process learns of it."""
    overrides = [f"run_folder={folder}", f"gad.start_from={folder.parent / 'start'}", *EVENTFUL, *settings]
    with open_run(load_recipe(recipe, overrides), processes) as run:
        try:
            gad(run)
        except AlarmError as alarm:
            return f"{alarm.exit_code} {alarm.alarm}: {alarm}"
    return "done"


def with_no_numbers(
    processes: Processes, recipe: Path, folder: Path, where: str
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The same with NaN in the second process alone, at one step; gives the weights it ended with too."""
    engines: list[Any] = []

    class KeptEngine(Engine[Any]):
        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            engines.append(self)

    calls = iter(range(1, 10**6))

    def spoil(_module: object, _given: object, output: Tensor) -> Tensor:
        # Its passes in training alone have gradients, one a step for its share of so few tokens.
        if not output.requires_grad or next(calls) != SPOILED_AT:
            return output
        if where == "loss":
            return output * torch.nan
        output.register_hook(lambda gradient: gradient * torch.nan)
        return output

    def opened(*arguments: Any, **named: Any) -> Any:
        model, renderer = load_language_model(*arguments, **named)
        if processes.rank == 1:
            model.model.norm.register_forward_hook(spoil)
        return model, renderer

    with patch.object(roles, "load_language_model", opened), patch.object(roles, "Engine", KeptEngine):
        ended = in_gad(processes, recipe, folder, "gad.save_every=1")
    student, discriminator = engines[:2]
    held = {"student": student, "discriminator": discriminator}
    return ended, {role: _weights(engine) for role, engine in held.items()}


def _weights(engine: Engine[Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.weights()}


def short_ones(processes: Processes, recipe: Path, ground: Path) -> dict[str, Any]:
    """The runs of few steps, one after the other: to start processes takes longest."""
    return {
        "stopped": in_gad(processes, recipe, ground / "stopped", *STOPPED),
        "stopped again": in_gad(processes, recipe, ground / "stopped", *STOPPED),
        **{
            where: with_no_numbers(processes, recipe, ground / where, where) for where in ("loss", "gradient")
        },
    }


def alarm_records(folder: Path) -> dict[str, Any]:
    """What a run has written down of alarms, and at which steps; the figures are those of the evidence."""
    run = RunFolder(folder)
    rows = run.rows("metrics.jsonl")
    return {
        "steps": [row["step"] for row in rows],
        "rests": [row["step"] for row in rows if row.get("detail/discriminator_skipped")],
        "alarms": run.rows("alarms.jsonl"),
        "remedies": [without_time(row) for row in run.rows("gad/remedies.jsonl")],
        "kept": checkpoint_steps(folder / "gad"),
        "is done": run.is_done("gad"),
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: str) -> Path:
    """One that all runs here share."""
    path = tmp_path_factory.mktemp("ground") / "recipe.toml"
    path.write_text(tiny_recipe, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(recipe: Path) -> Path:
    """The ground on which a warmup's checkpoint lies beside the runs that start from it."""
    ground = recipe.parent
    with open_run(load_recipe(recipe, ["student.dtype=float64", f"run_folder={ground / 'before'}"])) as run:
        warmup(run)
    for name in ("one", "two"):
        (ground / name).mkdir()
        (ground / name / "start").symlink_to((ground / "before" / "warmup" / "latest").resolve())
    return ground


@pytest.fixture(scope="module")
def on_two(recipe: Path, start: Path) -> list[dict[str, Any]]:
    """What each of two processes makes of the short runs."""
    return side_by_side(short_ones, recipe, start / "two")


@pytest.mark.slow
def test_two_processes_act_on_the_alarms_of_one_at_the_same_steps(recipe: Path, start: Path) -> None:
    assert in_gad(Processes(), recipe, start / "one" / "acted", *ACTED_UPON) == "done"
    assert side_by_side(in_gad, recipe, start / "two" / "acted", *ACTED_UPON) == ["done", "done"]
    one, two = alarm_records(start / "one" / "acted"), alarm_records(start / "two" / "acted")
    assert one == two

    actions = {row["name"]: row["action"] for row in two["alarms"]}
    assert actions["too-strong"] == "skip_discriminator"
    (raised,) = [row["step"] for row in two["alarms"] if row["name"] == "too-strong"]
    assert two["rests"] == list(range(raised + 1, STEPS + 1)) != []
    assert {(row["name"], row["is_done"]) for row in two["remedies"]} == {("drift", True)}
    assert all(0 < row["back_to"] < row["since"] for row in two["remedies"])
    assert two["is done"]


def test_two_processes_stop_where_one_does_and_do_so_again(
    recipe: Path, start: Path, on_two: list[dict[str, Any]]
) -> None:
    stopped = in_gad(Processes(), recipe, start / "one" / "stopped", *STOPPED)
    step = alarm_records(start / "one" / "stopped")["kept"][-1]
    assert stopped.startswith(f"4 copies: gad step {step}: alarm copies (stop): ")
    for outcome in on_two:
        assert (outcome["stopped"], outcome["stopped again"]) == (stopped, stopped)
    one, two = alarm_records(start / "one" / "stopped"), alarm_records(start / "two" / "stopped")
    assert one == two
    assert [row["step"] for row in two["alarms"] if row["name"] == "copies"] == [step]
    assert two["kept"] == [step] == [2]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_no_number_in_one_process_updates_nothing_in_either(
    where: str, recipe: Path, start: Path, on_two: list[dict[str, Any]]
) -> None:
    (ended, held), (other_ended, other_held) = (outcome[where] for outcome in on_two)
    assert ended == other_ended
    assert ended.startswith(f"4 not-finite: gad step {SPOILED_AT}: the {where}")
    assert "is nan" in ended
    assert "nothing was updated" in ended
    assert f"Last good checkpoint: step {SPOILED_AT - 1}." in ended
    folder = start / "two" / where
    found = alarm_records(folder)
    assert [(row["name"], row["step"]) for row in found["alarms"]] == [("not-finite", SPOILED_AT)]
    assert found["kept"][-1] == SPOILED_AT - 1
    for role, weights in held.items():
        stored = load_file(folder / "gad" / "latest" / role / "model.safetensors")
        for name, weight in weights.items():
            assert torch.equal(weight, other_held[role][name]), name
            if (kept := stored.get(name.removeprefix("backbone."))) is not None:
                assert torch.equal(weight, kept), name


@pytest.mark.slow
def test_every_rank_of_a_command_that_an_alarm_stops_ends_with_code_4_and_one_of_them_tells_it(
    recipe: Path, start: Path, on_two: list[dict[str, Any]]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [*EVENTFUL, *STOPPED, f"run_folder={start / 'commands'}"]
    settings.append(f"gad.start_from={start / 'two' / 'start'}")
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "gadfly", "gad", str(recipe), *settings]
        ranks.append(
            subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True)
        )
    error_lines = [rank.communicate(timeout=120)[1].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [4, 4], error_lines
    assert error_lines[1] == []
    assert error_lines[0][-1] == on_two[0]["stopped"].removeprefix("4 copies: ")
    assert sum("alarm copies" in line for line in error_lines[0]) == 2, "when it is raised, and at the end"
    assert alarm_records(start / "commands") == alarm_records(start / "two" / "stopped")
