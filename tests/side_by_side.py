"""Runs a function in two processes that are the ranks of one run, as torchrun would start them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from gadfly.distributed.ranks import open_ranks

SIZE = 2


def side_by_side(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(processes, *arguments)` gives in each of two processes, by rank; the first error it raises.

    Function, arguments and results are pickled.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(SIZE, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_as_rank, rank, port, work, arguments) for rank in range(SIZE)]
        return [rank.result() for rank in running]


def _as_rank(rank: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open_ranks(lambda line: os._exit(5)) as processes:
        return work(processes, *arguments)
