"""The models that `generate.checkpoints` names."""

import re
from dataclasses import dataclass
from pathlib import Path

from gadfly.checkpoint import latest_checkpoint, open_checkpoint
from gadfly.config import TRAINING_STAGES
from gadfly.errors import CheckpointError, ConfigError
from gadfly.model_identity import model_identity
from gadfly.stages.run import Run

# What a stage's folder has checkpoints as.
_STEP = re.compile(r"step-\d{6}|latest|best")


@dataclass(frozen=True)
class Model:
    """A model to generate with: the arm's name, what it is in full, and where it lies."""

    name: str
    checkpoint: str
    source: str


def check_names(run: Run) -> None:
    """Refuse before any training a name that can only be misspelt.

    Raises:
        ConfigError: naming it.
    """
    for name in run.recipe.generate.checkpoints:
        # What lies in the run's own folder may still be to come.
        is_own = Path(name).is_relative_to(run.folder.path)
        if name == "base" or is_own or (run.folder.path / name).exists() or Path(name).exists():
            continue
        stage, _, step = name.partition("/")
        if stage not in TRAINING_STAGES:
            raise ConfigError(
                f"generate.checkpoints: {name!r} is neither a stage nor in {run.folder.path} nor a folder"
            )
        if step and not _STEP.fullmatch(step):
            raise ConfigError(
                f"generate.checkpoints: {name!r}: of a stage there are {stage}/latest, {stage}/best and "
                f"such as {stage}/step-000100"
            )


def named_models(run: Run) -> list[Model]:
    """The models of `generate.checkpoints`, or by default the base and every training stage that is done.

    Raises:
        CheckpointError: if one is not there.
        ConfigError: if one is named twice.
    """
    names = run.recipe.generate.checkpoints or [
        "base",
        *(stage for stage in TRAINING_STAGES if run.folder.is_done(stage)),
    ]
    models = [find_model(run, name) for name in names]
    arms = [model.name for model in models]
    if twice := sorted({arm for arm in arms if arms.count(arm) > 1}):
        raise ConfigError(f"generate.checkpoints: {', '.join(twice)} is named twice; name each model once")
    return models


def find_model(run: Run, name: str) -> Model:
    """The model that a name of `generate.checkpoints` stands for.

    Raises:
        CheckpointError: if it is not there.
    """
    if name == "base":
        source = run.recipe.student.model
        return Model("base", model_identity(source) or source, source)
    if name in TRAINING_STAGES:
        checkpoint = latest_checkpoint(run.folder.stage(name))
        if checkpoint is None:
            raise CheckpointError(
                f"generate.checkpoints: no checkpoint of {name!r} under {run.folder.path}; "
                f"run that stage first"
            )
    else:
        path = next((path for path in (run.folder.path / name, Path(name)) if path.exists()), None)
        if path is None:
            raise CheckpointError(
                f"generate.checkpoints: {name!r} is neither in {run.folder.path} nor a folder"
            )
        if not (path / "manifest.json").exists():
            # Its own name alone would be `student` for the student of any checkpoint.
            arm = "/".join(path.resolve().parts[-3:])
            return Model(arm, model_identity(str(path)) or arm, str(path))
        checkpoint = open_checkpoint(path)
    step = f"{checkpoint.path.parent.name}/{checkpoint.path.name}"
    arm = name
    if Path(name).is_absolute():
        # One of another run bears that run's name.
        is_own = checkpoint.path.resolve().is_relative_to(run.folder.path.resolve())
        arm = step if is_own else "/".join(checkpoint.path.resolve().parts[-3:])
    return Model(arm, f"{step} ({checkpoint.digest[:8]})", str(checkpoint.path / "student"))
