"""Many processes by Ray Train: on a cluster, or on this machine alone; started again when one of them ends.

torchrun's processes write to the same terminal and end by themselves. Ray's workers are on any machine, so
what they have to say comes by a queue to the process that the user sees: log records, the result, or the
error that ends the run. That error travels as a value: what is raised is a crash to Ray, and tried again.
"""

import contextlib
import importlib
import importlib.util
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

from gadfly.console import show_logs
from gadfly.errors import GadflyError, RanksError, RunFolderError, UserError
from gadfly.run_folder import RunFolder

logger = logging.getLogger(__name__)

Work = Callable[[], Path]

# How often the workers are started again before the run is given up.
RESTARTS = 3
_POLL_SECONDS = 0.5
# For the others to come to an end by themselves, once one worker has told the error that ends the run.
_END_SECONDS = 5.0
# For the processes of the workers before to be gone, whose first one owns the run folder.
_LOCK_SECONDS = 60.0
# The heartbeats end a wait long before this, and can say who is missing.
_NETWORK_SECONDS = 24 * 3600


class _Begun:
    """Said by the first worker before it works."""


class _Bug:
    """Said by a worker that ends by one."""


def launch(work: Work, run_folder: Path, num_workers: int) -> Path:
    """Do the same work in each of Ray's workers, and pass on what the first one says.

    It is on the cluster of `RAY_ADDRESS` if that is set, where every machine needs gadfly, the files of the
    recipe under the same path, and keys of APIs in the environment of its Ray; else on this machine.

    Args:
        work: what `gadfly run` does in a process, as a function of a module or a `partial` of one.
        run_folder: the folder it locks and writes.
        num_workers: processes, each on a GPU if the cluster has any.

    Returns:
        What the work gave.

    Raises:
        UserError: Ray is not installed or not reached, or there are too few GPUs.
        RunFolderError: the run folder is in use or cannot be written.
        RanksError: workers ended over and over.
        GadflyError: the error of a worker, as if it had been met here.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"--ray-workers {num_workers}: Ray is not installed; pip install 'gadfly[ray]'")
    with RunFolder(run_folder).lock():
        # Free and writable, or it is told before Ray has started, which takes a while.
        pass
    # The machines of a cluster have the run folder in common, and Ray Train asks for such a place.
    storage = run_folder / ".ray"
    shutil.rmtree(storage, ignore_errors=True)
    # Ray's own remarks are no results.
    with contextlib.redirect_stdout(sys.stderr), _cluster(num_workers) as ray:
        has_gpus, here = _has_gpus(ray, num_workers), _here(ray)
        mailbox = importlib.import_module("ray.util.queue").Queue(actor_options=here)
        job = partial(_in_worker, work, run_folder, mailbox, Path.cwd(), sys.argv)
        # In a process of its own, for a thread that waits for Ray could not be stopped.
        remote = ray.remote(max_retries=0, **here)(_fit)
        try:
            return _follow(ray, remote.remote(job, storage, num_workers, has_gpus), mailbox)
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def _fit(job: Callable[[], None], storage: Path, num_workers: int, has_gpus: bool) -> None:
    """Have Ray Train do the job in every worker."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415

    TorchTrainer(
        job,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout_s=_NETWORK_SECONDS
        ),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=has_gpus),
        run_config=RunConfig(
            storage_path=str(storage),
            name="launch",
            failure_config=FailureConfig(max_failures=RESTARTS),
        ),
    ).fit()


def _follow(ray: Any, fit: Any, mailbox: Any) -> Path:
    """Pass on what workers say until all is over."""
    starts, has_bug, ends_at = 0, False, math.inf
    refusal: GadflyError | None = None
    result: Path | None = None
    is_over = False
    while not is_over and time.monotonic() < ends_at:
        # What is said is read once more after the end.
        is_over = bool(ray.wait([fit], timeout=0)[0])
        for message in _messages(mailbox):
            if isinstance(message, logging.LogRecord):
                logging.getLogger(message.name).handle(message)
            elif isinstance(message, _Begun):
                starts, has_bug = starts + 1, False
                if starts > 1:
                    logger.warning("workers: started again, %d of %d times", starts - 1, RESTARTS)
            elif isinstance(message, _Bug):
                has_bug = True
            elif isinstance(message, GadflyError) and refusal is None:
                refusal, ends_at = message, time.monotonic() + _END_SECONDS
            elif isinstance(message, Path):
                result = message
    if refusal is not None:
        raise refusal
    try:
        ray.get(fit)
    except Exception as failure:
        # A bug keeps the traceback, which is part of what Ray raises.
        if has_bug or starts == 0:
            raise
        raise RanksError(
            f"--ray-workers: workers were lost {starts} times; run the same command to go on from the last "
            f"checkpoint"
        ) from failure
    if result is None:
        raise RanksError("--ray-workers: no worker has told how it ended; run the same command to go on")
    return result


def _messages(mailbox: Any) -> Iterator[Any]:
    """What workers have said since, waiting for a moment if it is nothing."""
    with contextlib.suppress(importlib.import_module("ray.util.queue").Empty):
        yield mailbox.get(timeout=_POLL_SECONDS)
        while True:
            yield mailbox.get_nowait()


# In the workers.


def _in_worker(work: Work, run_folder: Path, mailbox: Any, folder: Path, argv: list[str]) -> None:
    """Do the work as a process of torchrun would, and send what it says by the queue."""
    is_first = os.environ["RANK"] == "0"
    show_logs(is_quiet=not is_first)
    logging.getLogger("gadfly").handlers[:] = [QueueHandler(mailbox)]
    # The command is noted in the run folder; Ray's own may hold a password.
    sys.argv[:] = argv
    # Paths of the command line are relative to it; on another machine it need not be there.
    with contextlib.suppress(OSError):
        os.chdir(folder)
    _set_local_rank()
    if is_first:
        mailbox.put(_Begun())
        _wait_for(run_folder)
    try:
        result = work()
    except RanksError as error:
        if error.is_shown_elsewhere:
            return
        logger.critical("%s", error)
        raise
    except GadflyError as error:
        if not error.is_shown_elsewhere:
            mailbox.put(error)
        return
    except Exception as bug:
        logger.critical("rank %s: %s: %s", os.environ["RANK"], type(bug).__name__, bug)
        mailbox.put(_Bug())
        raise
    if is_first:
        mailbox.put(result)


def _set_local_rank() -> None:
    """Have the number of the GPU that Ray gave this worker where torchrun would have it."""
    from ray.train.torch import get_device  # noqa: PLC0415

    device = get_device()
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)


def _wait_for(run_folder: Path) -> None:
    """Until the workers before have let go of the run folder, which `launch` has found free."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(RunFolderError), RunFolder(run_folder).lock():
            return
        time.sleep(_POLL_SECONDS)


# Around them.


@contextlib.contextmanager
def _cluster(num_workers: int) -> Iterator[Any]:
    """The cluster of RAY_ADDRESS, or one on this machine that ends with this process."""
    # Reports of use to Ray's authors are for the user to switch on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    address = os.environ.get("RAY_ADDRESS")
    # As torchrun does, a machine takes on as many processes as it is told to.
    size = {} if address else {"num_cpus": max(num_workers, os.cpu_count() or 1), "include_dashboard": False}
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **size)
    except (ConnectionError, RuntimeError, ValueError) as failure:
        where = f"RAY_ADDRESS={address}" if address else "a local Ray"
        raise UserError(
            f"{where}: cannot be reached ({str(failure).splitlines()[0]}); see that it runs, and that "
            f"RAY_AUTH_TOKEN is the cluster's if it asks for one"
        ) from failure
    try:
        for number, handler in ours.items():
            signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()


def _has_gpus(ray: Any, num_workers: int) -> bool:
    """Whether workers get a GPU each; says so if the cluster is too small for them."""
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    there = int(resources.get(kind, 0))
    if there < num_workers:
        if not os.environ.get("RAY_ADDRESS"):
            raise UserError(f"--ray-workers {num_workers}: this machine has {there} {kind}s; give no more")
        logger.warning("waiting for the cluster: it has %d %ss for %d workers", there, kind, num_workers)
    return kind == "GPU"


def _here(ray: Any) -> dict[str, Any]:
    """Options of what is to be on this machine, and outlive any other."""
    strategy = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": strategy(node, soft=True)}
