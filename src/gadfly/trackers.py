"""Optional sinks for metrics besides `metrics.jsonl`: TensorBoard, trackio, Weights & Biases.

Steps start again at 1 in every stage, so each name begins with its stage, as in
`gad/discriminator/accuracy`, and each stage has a step axis of its own. The libraries are imported
only when asked for.
"""

import importlib.metadata
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from gadfly.errors import ConfigError


@runtime_checkable
class Tracker(Protocol):
    """Where the metrics of a run go."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one step of a stage."""

    def close(self) -> None:
        """Write out what is held back; nothing is logged after this."""


@dataclass(frozen=True)
class _Run:
    """What a tracker is told when it opens."""

    project: str
    name: str
    folder: Path
    config: dict[str, object]


def open_trackers(
    names: Sequence[str],
    *,
    project: str,
    run_name: str,
    folder: Path,
    config: dict[str, object],
) -> list[Tracker]:
    """Open the trackers named.

    A run that is resumed goes on where it was; a step done again after a kill is there twice.

    Args:
        names: any of `tensorboard`, `trackio`, `wandb`.
        project: what the run is filed under.
        run_name: what the run is called there.
        folder: the run folder. TensorBoard and W&B keep their files there, in `tensorboard` and
            `wandb`; trackio keeps them in its own place (`TRACKIO_DIR`).
        config: the settings of the run, shown beside its curves.

    Raises:
        ConfigError: a package is not installed, or W&B refuses to start.

    Example:
        >>> open_trackers([], project="gadfly", run_name="pirate", folder=Path("."), config={})
        []
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"trackers.names: {', '.join(missing)} not installed; pip install 'gadfly[trackers]'"
        )
    run = _Run(project, run_name, folder, config)
    return [_OPENERS[name](run) for name in names]


def _is_installed(package: str) -> bool:
    # Importing it would not tell: a mere folder `wandb` in the current one passes for a package.
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class _TensorBoard:
    def __init__(self, run: _Run) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        settings = json.dumps(run.config, indent=4, default=str)
        # Markdown: four blanks more make it a block of code.
        self._writer.add_text("config", "    " + settings.replace("\n", "\n    "))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: _Run) -> None:
        import trackio  # noqa: PLC0415

        self._run = trackio.init(run.project, name=run.name, resume="allow", config=run.config)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, run: _Run) -> None:
        import wandb  # noqa: PLC0415

        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                dir=run.folder,
                id=_wandb_id(run.folder),
                resume="allow",
                config=run.config,
            )
        except wandb.Error as refusal:
            raise ConfigError(
                f"trackers.names: wandb cannot start: {refusal} "
                "(WANDB_MODE=offline keeps the metrics on this machine)"
            ) from None
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._stages:
            # W&B's own step may only grow, so ours is a metric, and the axis of its stage.
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        self._run.log({f"{stage}/step": step, **named})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: Path) -> str:
    """The id under which W&B knows the run of this folder, kept there from the first time on."""
    file = folder / "wandb-run-id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")


_OPENERS: dict[str, Callable[[_Run], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
