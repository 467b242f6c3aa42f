"""What a disk or a folder refuses, told in a line whichever library met it."""

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from gadfly.errors import RunFolderError


def refusal_in(failure: BaseException) -> str | None:
    """Why a disk or a folder refused; None if the failure is of another kind.

    Example:
        >>> refusal_in(OSError(28, "No space left on device")), refusal_in(ZeroDivisionError())
        ('[Errno 28] No space left on device', None)
    """
    if isinstance(failure, CheckpointException):
        return _refusal_in_some_rank(failure)
    # The tokenizers library raises plain exceptions, with the system's error in the text.
    if isinstance(failure, (OSError, SafetensorError, RunFolderError)) or "(os error " in str(failure):
        return str(failure).strip().splitlines()[0]
    return None


def _refusal_in_some_rank(failures: CheckpointException) -> str | None:
    """The first that torch has gathered, and its rank unless that is the one which tells it."""
    for rank, (failure, _) in sorted(failures.failures.items()):
        if reason := refusal_in(failure):
            return reason if rank == 0 else f"rank {rank}: {reason}"
    return None
