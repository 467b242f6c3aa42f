"""Earlier discriminators of a run, read from the checkpoints that are kept, to score what is sampled today.

The live discriminator's score is not comparable from step to step: it moves with what it judges. A frozen one
is, so whether the student gains on all of them or only on the latest tells progress from going in circles.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gadfly.checkpoint import checkpoint_steps
from gadfly.distributed.processes import Processes
from gadfly.errors import CheckpointError
from gadfly.lora import ADAPTER, STORED
from gadfly.tensor_files import check_tensors, load_tensors

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """A discriminator as it was saved: `warmup` is what gad began with, `gad-000100` that of a step."""

    name: str
    folder: Path


def earlier_discriminators(stage: Path, start: Path | None = None) -> list[Snapshot]:
    """Those that a stage can look back on: the one it began with, and the newest that it has saved.

    Others may be there or not, as checkpoints are pruned, and would not be the same ones in a run that goes
    back to an earlier step.

    Args:
        stage: folder of the stage that is running.
        start: the checkpoint that gad began with. Default: the last of warmup beside it.
    """
    found = []
    warmup = stage.parent / "warmup"
    if stage != warmup:
        began = start or _newest(warmup)
        found += [Snapshot("warmup", began / "discriminator")] if began else []
    newest = _newest(stage)
    if newest:
        name = f"{stage.name}-{newest.name.removeprefix('step-')}"
        found.append(Snapshot(name, newest / "discriminator"))
    return found


def _newest(stage: Path) -> Path | None:
    steps = checkpoint_steps(stage)
    return stage / f"step-{steps[-1]:06d}" if steps else None


def with_snapshot(
    snapshot: Snapshot, model: nn.Module, processes: Processes, action: Callable[[], T]
) -> T | None:
    """Do something while the model has the weights of a snapshot; then it has its own again, bit for bit.

    It takes as much memory on the CPU as the trained weights do (each process: its shards of them).

    Args:
        snapshot: which one.
        model: the live discriminator.
        processes: who works on it; every one has to ask.
        action: what to do, such as scoring.

    Returns:
        What `action` gives; None, with a warning, for a snapshot that cannot be read.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    is_adapter = any(f".{ADAPTER}." in name for name in trained)
    tensors = {_stored_name(name, is_adapter): weight.detach() for name, weight in trained.items()}
    with _put_back(list(tensors.values())):
        try:
            # One that a process cannot open must not leave the others waiting for it.
            processes.together("an earlier discriminator", lambda: check_tensors(tensors, snapshot.folder))
            load_tensors(tensors, snapshot.folder, group=processes.group)
        except CheckpointError as refusal:
            logger.warning("%s scores nothing: %s", snapshot.name, refusal)
            return None
        return action()


def _stored_name(name: str, is_adapter: bool) -> str:
    """What the discriminator's tensor is called in the files of its folder."""
    part, _, rest = name.partition(".")
    if part == "backbone" and is_adapter:
        return STORED + rest.replace(f".{ADAPTER}.", ".")
    return rest


@contextmanager
def _put_back(tensors: list[Tensor]) -> Iterator[None]:
    """Whatever happens to the tensors inside, they end as they began."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    kept = [tensor.to("cpu", copy=True) for tensor in own]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(own, kept, strict=True):
                tensor.copy_(before)
