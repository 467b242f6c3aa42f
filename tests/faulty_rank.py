"""The command line with a fault in one rank, for tests of what the others make of it.

    torchrun ... faulty_rank.py FAULT RANK AT run recipe.toml ...

FAULT is what happens in rank RANK at the AT-th time (torch's own functions are patched, none of gadfly's):
`die-in-step`, `hang-in-step`, `die-in-save`, `die-in-hand-over`; `die-in-deaf-step` and
`kill-launcher-in-deaf-step`, while all others are in a wait that no signal gets through to, as those for GPUs
are; `fail-in-new-group`; or `other-code`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.tensor import DTensor


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    time.sleep(10_000)


def _fail() -> None:
    raise RuntimeError("out of ports")


def _kill_launcher() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    _wait_deafly()


def _wait_deafly(gone: int | None = None) -> None:
    """Be in a call into C for ever: what is waited for is there, and never comes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    others = [(rank + step) % size for step in range(1, size)]
    dist.recv(torch.zeros(1), src=next(other for other in others if other != gone))


def _at(count: int, function: Callable[..., Any], fault: Callable[[], None]) -> Callable[..., Any]:
    calls = iter(range(1, 10**9))

    def with_fault(*arguments: Any, **named: Any) -> Any:
        if next(calls) == count:
            sys.stderr.write(f"fault {time.time()}\n")
            sys.stderr.flush()
            fault()
        return function(*arguments, **named)

    return with_fault


def main() -> None:
    fault, rank, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.argv[1:4] = []
    is_it = os.environ["RANK"] == rank
    if fault.endswith("-step") and (is_it or fault.endswith("deaf-step")):
        acts = {"die": _die, "hang": _hang, "kill": _kill_launcher}
        others_act = partial(_wait_deafly, int(rank) if fault.startswith("die") else None)
        act = acts[fault.split("-")[0]] if is_it else others_act
        torch.optim.AdamW.step = _at(at, torch.optim.AdamW.step, act)
    elif is_it and fault == "die-in-save":
        distributed_checkpoint.save = _at(at, distributed_checkpoint.save, _die)
    elif is_it and fault == "die-in-hand-over":
        DTensor.full_tensor = _at(at, DTensor.full_tensor, _die)
    elif is_it and fault == "fail-in-new-group":
        dist.new_group = _at(at, dist.new_group, _fail)
    elif is_it and fault == "other-code":
        import gadfly.stages.run

        gadfly.stages.run.code_digest = lambda: "another"
    from gadfly.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
