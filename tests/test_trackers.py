import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from gadfly.errors import ConfigError
from gadfly.trackers import Tracker, open_trackers

CONFIG: dict[str, object] = {"gad": {"group_size": 8}, "seed": 0}


def open_one(name: str, folder: Path) -> Tracker:
    (tracker,) = open_trackers([name], project="tests", run_name="pirate", folder=folder, config=CONFIG)
    return tracker


def log_two_stages(tracker: Tracker) -> None:
    """Four steps of one stage, then two of the next, whose steps are lower than the last one."""
    for step in range(1, 5):
        tracker.log("warmup", step, {"discriminator/accuracy": 0.5 + step / 8})
    for step in range(1, 3):
        tracker.log("gad", step, {"discriminator/accuracy": step / 4, "student/kl_nats": math.nan})
    tracker.close()


def test_tensorboard_keeps_every_step_of_every_stage(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    log_two_stages(open_one("tensorboard", tmp_path))

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert sorted(curve) == [
        "gad/discriminator/accuracy",
        "gad/student/kl_nats",
        "warmup/discriminator/accuracy",
    ]
    assert curve["warmup/discriminator/accuracy"] == [(1, 0.625), (2, 0.75), (3, 0.875), (4, 1.0)]
    assert curve["gad/discriminator/accuracy"] == [(1, 0.25), (2, 0.5)]
    assert all(math.isnan(value) for _, value in curve["gad/student/kl_nats"])
    (config,) = (event.tensor_proto.string_val for event in events.Tensors("config/text_summary"))
    assert json.loads(config[0]) == CONFIG


def test_tensorboard_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    for step in (1, 2):
        tracker = open_one("tensorboard", tmp_path)
        tracker.log("gad", step, {"student/loss": 1.0})
        tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("gad/student/loss")] == [1, 2]


def test_wandb_has_a_step_axis_for_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    log_two_stages(open_one("wandb", tmp_path))
    log_two_stages(open_one("wandb", tmp_path))

    # A resumed run keeps its id; each offline file ends with it.
    files = {file.name for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert len(files) == 1
    written = b"".join(file.read_bytes() for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    for name in (b"warmup/step", b"warmup/*", b"gad/step", b"gad/*", b"gad/discriminator/accuracy"):
        assert name in written


def test_wandb_without_a_login_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"api_key not configured \(WANDB") as refused:
        open_one("wandb", tmp_path)
    assert "\n" not in str(refused.value)


def test_trackio_keeps_every_step_of_every_stage(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    # trackio reads TRACKIO_DIR once, when it is imported; hence a process of its own.
    script = """
import json, sys
from pathlib import Path
from gadfly.trackers import open_trackers
for steps in (range(1, 3), range(3, 5)):
    (tracker,) = open_trackers(
        ["trackio"], project="tests", run_name="pirate", folder=Path(), config={"seed": 0}
    )
    for step in steps:
        tracker.log("warmup", step, {"student/loss": float(step)})
    tracker.close()
(tracker,) = open_trackers(
    ["trackio"], project="tests", run_name="pirate", folder=Path(), config={"seed": 0}
)
tracker.log("gad", 1, {"student/loss": 0.5})
tracker.close()
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_run_records("tests")
rows = SQLiteStorage.get_logs("tests", run["name"], run_id=run["id"])
names = ("step", "warmup/student/loss", "gad/student/loss")
Path(sys.argv[1]).write_text(json.dumps([[row.get(name) for name in names] for row in rows]))
"""
    rows = tmp_path / "rows.json"
    environment = {"TRACKIO_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(rows)], env=environment, check=True, timeout=120)
    assert sorted(json.loads(rows.read_text()), key=str) == [
        [1, 1.0, None],
        [1, None, 0.5],
        [2, 2.0, None],
        [3, 3.0, None],
        [4, 4.0, None],
    ]


def test_a_missing_package_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ConfigError) as missing:
        open_trackers(["trackio", "wandb"], project="tests", run_name="a", folder=tmp_path, config={})
    assert str(missing.value) == (
        "trackers.names: trackio, wandb not installed; pip install 'gadfly[trackers]'"
    )


def test_no_tracker_costs_no_import() -> None:
    script = (
        "import sys; from gadfly.trackers import open_trackers; from pathlib import Path; "
        "open_trackers([], project='', run_name='', folder=Path(), config={}); "
        "sys.exit(bool({'torch', 'tensorboard', 'trackio', 'wandb'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
