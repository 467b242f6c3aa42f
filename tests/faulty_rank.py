"""The command line with a fault in one rank, for tests of what the others make of it.

    torchrun ... faulty_rank.py FAULT RANK AT run recipe.toml ...

FAULT is what happens in rank RANK at the AT-th time: `die-in-step`, `hang-in-step`, `die-in-save`,
`die-in-hand-over` (torch's own functions are patched, none of gadfly's), or `other-code`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.tensor import DTensor


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    time.sleep(10_000)


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
    if os.environ["RANK"] == rank:
        if fault.endswith("-in-step"):
            act = _die if fault.startswith("die") else _hang
            torch.optim.AdamW.step = _at(at, torch.optim.AdamW.step, act)
        elif fault == "die-in-save":
            distributed_checkpoint.save = _at(at, distributed_checkpoint.save, _die)
        elif fault == "die-in-hand-over":
            DTensor.full_tensor = _at(at, DTensor.full_tensor, _die)
        elif fault == "other-code":
            import gadfly.stages.run

            gadfly.stages.run.code_digest = lambda: "another"
    from gadfly.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
