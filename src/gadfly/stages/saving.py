"""Writes the checkpoints of a stage, at once or in the background while training goes on."""

import concurrent.futures
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gadfly.checkpoint import Checkpoint, save_checkpoint
from gadfly.discriminator import Scores
from gadfly.distributed.processes import Processes
from gadfly.engine import Engine
from gadfly.errors import AlarmError
from gadfly.logprobs import Logprobs
from gadfly.tensor_files import save_tensors

Engines = Mapping[str, Engine[Logprobs] | Engine[Scores]]
Snapshot = Callable[[bool], Callable[[Path], None]]
"""Given whether it is to be a copy, which stays as it is when training goes on: what writes the models."""

# How often a wait looks at how far the background has come.
_LOOK_SECONDS = 1.0


class CheckpointWriter:
    """Saves models and optimisers of a stage, one checkpoint at a time.

    Args:
        stage: the folder of the stage.
        engines: by role, whose optimisers go into the checkpoints.
        snapshot: the models as they are now, as a function that fills a checkpoint folder with them.
        processes: who works on it. The first one writes the models; each writes its share of the optimisers.
        in_background: whether to copy everything and write it while training goes on.
    """

    def __init__(
        self,
        stage: Path,
        engines: Engines,
        snapshot: Snapshot,
        processes: Processes,
        *,
        in_background: bool,
    ):
        self._stage, self._engines, self._snapshot = stage, engines, snapshot
        self._main = self._processes = processes
        self._background: ThreadPoolExecutor | None = None
        self._under_way: Future[Checkpoint] | None = None
        if in_background:
            self._processes = processes.beside()
            self._background = ThreadPoolExecutor(1, "checkpoint", initializer=_with_the_same_gpu())

    def save(self, step: int, facts: Mapping[str, Any], then: Callable[[], None]) -> None:
        """Save what there is now, and do `then` once it is on disk.

        Raises:
            AlarmError: weights that are not finite, which no stage could go on from.
            RunFolderError: this checkpoint, or the one before in the background, cannot be written.
        """
        self.wait()
        self._main.together("weights to save", self._check_finite)
        write_models = self._snapshot(self._background is not None)
        optimizers = {role: engine.optimizer_state() for role, engine in self._engines.items()}
        if self._background is not None:
            optimizers = {role: _copy(state) for role, state in optimizers.items()}

        def write(folder: Path) -> list[Path]:
            written: list[Path] = []
            for role, state in optimizers.items():
                written += save_tensors(state, folder / "trainer" / role, group=self._processes.group)
            if self._processes.rank == 0:
                write_models(folder)
            return written

        def work() -> Checkpoint:
            checkpoint = save_checkpoint(self._stage, step, write, facts, self._processes)
            then()
            return checkpoint

        if self._background is None:
            work()
        else:
            self._under_way = self._background.submit(work)

    def _check_finite(self) -> None:
        for role, engine in self._engines.items():
            for name, weight in engine.model.named_parameters():
                own = weight.to_local() if isinstance(weight, DTensor) else weight
                if weight.requires_grad and not own.isfinite().all():
                    raise AlarmError(f"{role}: weights are not finite after the update: {name}", "not-finite")

    def wait(self) -> None:
        """Let the checkpoint that is being written come to its end."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._main.note("the end of the checkpoint in the background")
            while not under_way.done():
                self._main.follow(self._processes)
                concurrent.futures.wait([under_way], timeout=_LOOK_SECONDS)
            under_way.result()


def _with_the_same_gpu() -> Callable[[], None] | None:
    """What a new thread has to do so that it means the same GPU as this one where none is named."""
    return partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
