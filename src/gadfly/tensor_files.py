"""Tensors by name in a folder, whole or in shards of many processes, with `torch.distributed.checkpoint`.

The files are safetensors: opening one runs no code.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gadfly.disk_refusals import refusal_in
from gadfly.errors import CheckpointError


def save_tensors(
    tensors: dict[str, Tensor], folder: Path, *, group: dist.ProcessGroup | None = None
) -> list[Path]:
    """Write tensors by name.

    Args:
        tensors: whole ones, or in shards of the processes, each of which writes its own.
        folder: where to.
        group: the processes; None for this one alone.

    Returns:
        The files that this process wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(str(folder), save_distributed=group is not None)
    with _one_process():
        distributed_checkpoint.save(
            tensors, storage_writer=writer, process_group=group, no_dist=group is None
        )
    return [folder / name for name in sorted(writer.names)]


def load_tensors(tensors: dict[str, Tensor], folder: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Read tensors written by `save_tensors` into those given, in place.

    They may have been written by another number of processes: each reads what its shards need.

    Raises:
        CheckpointError: if names or shapes differ, or a file cannot be read, by whichever process.
    """
    check_tensors(tensors, folder)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with _one_process():
            distributed_checkpoint.load(
                tensors, storage_reader=reader, process_group=group, no_dist=group is None
            )
    except CheckpointException as failure:
        if (reason := refusal_in(failure)) is None:
            raise
        raise _unreadable(folder, reason) from failure


def check_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a folder that this process cannot read, or that holds other tensors; it waits for no other.

    Raises:
        CheckpointError: if names or shapes differ, or a file cannot be opened.
    """
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as failure:
        raise _unreadable(folder, str(failure)) from None
    saved = {
        name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "missing"), wanted.get(name, "missing")
        if there != here:
            raise CheckpointError(
                f"{folder}: of another model than the recipe's: {name} has shape {there} there, {here} here"
            )


class _Writer(HuggingFaceStorageWriter):
    """Keeps the names of the files that this process writes."""

    names: frozenset[str] = frozenset()

    def write_data(self, plan: Any, planner: Any) -> Any:
        future = super().write_data(plan, planner)
        self.names = frozenset(result.storage_data.relative_path for result in future.wait())
        return future


def _unreadable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{folder}: cannot be read: {reason}; restore it from an intact copy")


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    # It warns that there is no process group, which is what `no_dist=True` has just told it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
