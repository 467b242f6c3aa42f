"""The proving ground run for real: every experiment at its smallest, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.experiment import FOLDER, load_experiment, names

# One arm of each kind, and one whose reward is a function of the ground.
FEW_ARMS = {"records": ("dpo", "imitate-lm-cold", "oracle")}


def experiment(*arguments: object, timeout: float = 280) -> str:
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    ended = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The smallest mixture: its folder, to be copied, and what was printed."""
    folder = tmp_path_factory.mktemp("mixture")
    return folder, experiment("mixture", "--quick", "--folder", folder)


@pytest.fixture
def mixture(ran: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the smallest mixture."""
    return Path(shutil.copytree(ran[0], tmp_path / "copy", symlinks=True))


def test_an_arm_that_an_experiment_does_not_have_is_refused(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "experiments",
        "records",
        "--arms",
        "dpo,none",
        "--folder",
        str(tmp_path),
    ]
    ended = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("--arms: records has no none; it has ")
    assert not list(tmp_path.iterdir())


def test_the_mixture_runs_and_what_is_done_is_not_done_again(ran: tuple[Path, str], mixture: Path) -> None:
    _, first = ran
    assert all(f"| {title} |" in first for title in load_experiment("mixture").titles.values())
    metrics = mixture / "mixture-quick" / "seed-2" / "metrics.jsonl"
    before = metrics.read_bytes()
    assert experiment("mixture", "--quick", "--folder", mixture) == first
    assert metrics.read_bytes() == before


def test_seeds_that_settings_were_chosen_on_are_in_no_table(mixture: Path) -> None:
    shutil.copytree(mixture / "mixture-quick" / "seed-2", mixture / "mixture-quick" / "seed-0")
    both = experiment("mixture", "--quick", "--pages", "--first", 0, "--seeds", 3, "--folder", mixture)
    assert ", seeds 0, 2;" in both
    assert ", seeds 2;" in experiment("mixture", "--quick", "--pages", "--folder", mixture)


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_was_begun_with_other_settings_is_refused_and_in_no_table(
    is_killed: bool, mixture: Path
) -> None:
    if is_killed:
        (mixture / "mixture-quick" / "seed-2" / "measured.json").unlink()
    command = [sys.executable, "-m", "experiments", "mixture", "--quick", "--folder", str(mixture)]
    other = [*command, "gad.max_steps=3"]
    ended = subprocess.run(other, cwd=FOLDER.parent, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    refusal = f"{mixture / 'mixture-quick' / 'seed-2'}: begun with another recipe, arm or settings; delete"
    assert ended.stderr.splitlines()[-1].startswith(refusal)
    assert "no seed has been run" in experiment(*command[3:], "--pages", "gad.max_steps=3")


def test_a_folder_that_nobody_knows_the_origin_of_is_refused(mixture: Path) -> None:
    seed = mixture / "mixture-quick" / "seed-2"
    (seed / "origin.json").unlink()
    command = [sys.executable, "-m", "experiments", "mixture", "--quick", "--folder", str(mixture)]
    ended = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"{seed}: begun with another recipe, arm or settings")


def test_an_arm_begun_with_other_settings_is_refused(mixture: Path) -> None:
    arm = mixture / "mixture-quick" / "seed-2" / "arms" / "gad-frozen-discriminator"
    (arm / "measured.json").unlink()
    (arm / "origin.json").write_text('{"origin": "that of other settings"}', encoding="utf-8")
    command = [sys.executable, "-m", "experiments", "mixture", "--quick", "--folder", str(mixture)]
    ended = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"{arm}: begun with another recipe, arm or settings")


def test_settings_may_stand_behind_options(tmp_path: Path) -> None:
    printed = experiment(
        "mixture", "--pages", "--first", 0, "--seeds", 1, "--folder", tmp_path, "gad.max_steps=9"
    )
    assert "gad.max_steps=9" in printed


def smallest(name: str, arms: tuple[str, ...] | None, folder: Path, timeout: float = 280) -> None:
    """Run it with some arms, or all, and look for their rows in what is printed."""
    experiment_of = load_experiment(name)
    settings = experiment_of.ground_settings
    for needed in (str(settings[key]) for key in ("models", "model", "data") if key in settings):
        if not (FOLDER.parent / needed).is_dir():
            pytest.skip(f"nothing at {needed}")
    chosen = experiment_of.arms.keys() if arms is None else arms
    listed = ("--arms", ",".join(arms) or "none") if arms is not None else ()
    printed = experiment(name, "--quick", "--folder", folder, *listed, timeout=timeout)
    for model in (*experiment_of.models, *chosen):
        assert f"| {experiment_of.titles[model]} |" in printed


@pytest.mark.parametrize("name", [name for name in names() if name not in ("mixture", "alpaca")])
def test_every_other_experiment_runs_at_its_smallest(name: str, tmp_path: Path) -> None:
    smallest(name, FEW_ARMS.get(name, ()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if name not in ("mixture", "alpaca")])
def test_every_arm_runs_at_its_smallest(name: str, tmp_path: Path) -> None:
    smallest(name, None, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_experiment_with_a_large_model_runs_at_its_smallest(tmp_path: Path) -> None:
    smallest("alpaca", None, tmp_path, timeout=3500)
