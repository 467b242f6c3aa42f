"""Runs the arms of an experiment, seed by seed. What is done already is not done again.

SEED/recipe.toml, data/, models/     what the ground made
SEED/origin.json                     a digest of what all this is made by; so for each arm
SEED/                                the main run: seqkd, warmup, gad, seqkd-equal-time, generate
SEED/arms/ARM/                       each arm's own run folder
"""

import datetime
import logging
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.arms import train_dpo, train_on_samples
from experiments.experiment import Arm, Experiment
from experiments.grounds import Ground, open_ground, reward_functions
from gadfly.errors import ConfigError
from gadfly.recipe_file import load_recipe
from gadfly.run_folder import RunFolder
from gadfly.stages.pipeline import stage
from gadfly.stages.run import Run, open_run

logger = logging.getLogger(__name__)

_REMEDY = "delete it, or name another folder with --folder"
_MAIN = ("seqkd", "warmup", "gad", "seqkd-equal-time")


def run_seed(
    name: str,
    experiment: Experiment,
    folder: Path,
    seed: int,
    settings: Sequence[str],
    ground_settings: Mapping[str, Any],
    arms: Sequence[str] | None = None,
) -> None:
    """Run everything of one seed that is missing.

    Args:
        name: the experiment's.
        experiment: what it consists of.
        folder: where to; the seed has a folder in it.
        seed: of data, models and samples.
        settings: more `key=value` for every run.
        ground_settings: what the ground makes of data and models.
        arms: only these beside the main run. Default: all.

    Raises:
        ConfigError: what is there was begun with another recipe, other settings or another arm of that name.
    """
    place = folder.resolve() / f"seed-{seed}"
    ground = open_ground(experiment.ground)
    origins = experiment.origins(settings, ground_settings)
    _begin(place, origins["gad"])
    if not (place / "recipe.toml").exists():
        ground.prepare(place, seed, ground_settings)
        # Last: with it, everything is there.
        shutil.copyfile(experiment.recipe_file, place / "recipe.toml")
    own = [f"seed={seed}", f'run_folder="{place}"', *settings]
    with open_run(load_recipe(place / "recipe.toml", own)) as run:
        if not run.folder.read_json("measured.json"):
            for stage_name in _MAIN:
                if stage_name in experiment.models:
                    stage(stage_name)(run)
            stage("generate")(run)
            if experiment.tells:
                stage("judge")(run)
            _measure(ground, run, ground_settings)
    for arm_name in experiment.arms if arms is None else arms:
        arm = experiment.arms[arm_name]
        where = place / "arms" / arm_name
        _begin(where, origins[arm_name])
        recipe = load_recipe(place / "recipe.toml", [*own, *_settings(place, arm, where)])
        with open_run(recipe, reward_functions=reward_functions(ground, recipe)) as run:
            if not run.folder.read_json("measured.json"):
                logger.info("%s, seed %d: %s", name, seed, arm_name)
                _run_arm(arm, place, run, tells=experiment.tells)
                _measure(ground, run, ground_settings)


def _begin(path: Path, origin: str) -> None:
    """Note first of all what the folder's figures are made by: whatever it holds later is of that."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    begun = folder.read_json("origin.json").get("origin")
    if begun == origin:
        return
    if begun or any(path.iterdir()):
        raise ConfigError(f"{path}: begun with another recipe, arm or settings; {_REMEDY}")
    folder.write_json("origin.json", {"origin": origin})


def _settings(place: Path, arm: Arm, where: Path) -> list[str]:
    """An arm's own, and by which it takes over from the main run, and generates its own student alone."""
    own = [
        f'run_folder="{where}"',
        f'generate.checkpoints=["{"gad" if arm.kind == "gad" else "student"}"]',
        *(setting.replace("{seed}", str(place)) for setting in arm.settings),
    ]
    start = f'gad.start_from="{place / "warmup" / "latest"}"'
    return [*own, start] if arm.kind == "gad" and arm.again == "gad" else own


def _run_arm(arm: Arm, place: Path, run: Run, *, tells: bool) -> None:
    if arm.kind == "gad":
        chooses = ("best",) if run.recipe.checkpoints.best_by == "tell" else ()
        for name in (*(("warmup",) if arm.again == "warmup" else ()), "gad", *chooses):
            stage(name)(run)
    elif not (run.folder.path / "student").exists():
        train = train_dpo if arm.kind == "dpo" else train_on_samples
        began = time.perf_counter()
        trained = train(run, place)
        run.folder.update_summary("stages", {"student": {"seconds": round(time.perf_counter() - began, 3)}})
        # Last: with it, the arm is trained.
        trained.rename(run.folder.path / "student")
    stage("generate")(run)
    if tells:
        stage("judge")(run)


def _measure(ground: Ground, run: Run, settings: Mapping[str, Any]) -> None:
    ground.measure(run, settings)
    date = datetime.date.today().isoformat()
    run.folder.write_json("measured.json", {"date": date, "machine": _machine()})


def _machine() -> str:
    """The processor, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    wide = "with" if "avx512f" in flags.split() else "without"
    system = f"{platform.system()} {platform.machine()}"
    return f"{len(names)} cores of {names[0]}, {wide} AVX-512, {system}" if names else platform.platform()
