"""Many processes side by side, as torchrun or Ray Train starts them: how they talk to each other.

One process is a *rank*. Collectives of the models are FSDP2's (see `engine/sharding.py`); what is here is for
everything else: Python objects, over gloo, with a time-out that says who kept whom waiting.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gadfly.distributed.heartbeats import Heartbeats, Status
from gadfly.distributed.processes import Processes
from gadfly.errors import GadflyError, RanksError, UserError

T = TypeVar("T")

# The heartbeats end a wait long before this, and can say who is missing.
_NETWORK_TIMEOUT = timedelta(days=1)
_CONNECT_SECONDS = 300


class Ranks(Processes):
    """This process among the others; opened by `open_ranks`."""

    def __init__(self, status: Status, heartbeats: Heartbeats, name: str = "main"):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._status, self._heartbeats, self._name = status, heartbeats, name
        # Each thread counts its own: the threads of two ranks come to theirs in any order.
        self._num_meetings = self._num_beside = 0
        # Of its own: on GPUs the group of the models cannot carry Python objects.
        self.group = dist.new_group(backend="gloo", timeout=_NETWORK_TIMEOUT)

    @property
    def place(self) -> str:
        """Where the work is, as in `gad step 7`."""
        return self._status.place

    @place.setter
    def place(self, place: str) -> None:
        self._status.place = place

    def once(self, what: str, action: Callable[[], T], *, is_patient: bool = False) -> T:
        """Do something in the first process; every process gets its result, or its error."""
        outcome: list[Any] = [None, None]
        with self._status.doing(what, is_patient=is_patient):
            if self.rank == 0:
                try:
                    outcome[0] = action()
                except GadflyError as error:
                    outcome[1] = error
                # What asks an API has asyncio listen in its place.
                self._heartbeats.requests.listen()
            if is_patient:
                # A collective would run into its time-out.
                self._num_meetings += 1
                self._heartbeats.meet(f"{self._name}/{self._num_meetings}")
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        result, refusal = outcome
        if refusal is not None:
            raise refusal
        return result  # type: ignore[no-any-return]

    def gather(self, what: str, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values: list[Any] = [None] * self.size
        with self._status.doing(f"the others' {what}"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def note(self, what: str) -> None:
        """Say what this process is about to do."""
        self._status.note(what)

    def progress(self, what: str) -> None:
        """Say how far this process has come with what it does."""
        self._status.progress(what)

    def follow(self, beside: Processes) -> None:
        """While this thread waits for one beside it: say what that has come to."""
        assert isinstance(beside, Ranks), "made by `beside`"
        self._status.follow(beside._status)

    def beside(self) -> "Ranks":
        """The same processes for a thread that works beside the main one, with a group of its own."""
        self._num_beside += 1
        return Ranks(self._status.beside(), self._heartbeats, f"{self._name}/beside-{self._num_beside}")

    def limit_waits(self, seconds: float) -> None:
        """How long one rank may keep the others waiting, without progress, from now on."""
        self._heartbeats.timeout_seconds = seconds


@contextlib.contextmanager
def open_ranks(on_stuck: Callable[[str], None]) -> Iterator[Ranks]:
    """Join the process group that the environment describes, or that Ray Train has set up already.

    Args:
        on_stuck: called, in a thread, with one line to tell (or none) once a wait has been too long; the main
            thread may be stuck in it, so this has to end the process.

    Raises:
        RanksError: the other processes cannot be reached, or one of them is gone.
    """
    is_ours = not dist.is_initialized()
    try:
        store = _store()
        if is_ours:
            _await_all(store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=_NETWORK_TIMEOUT,
            )
        heartbeats = Heartbeats(_store(), dist.get_rank(), dist.get_world_size(), status := Status())
    except (RuntimeError, KeyError, ValueError) as failure:
        raise RanksError(
            f"the other processes cannot be reached ({str(failure).splitlines()[0]}); start all of them with "
            f"torchrun, with the same rendezvous"
        ) from failure
    try:
        heartbeats.start(on_stuck)
        _take_gpu()
        ranks = Ranks(status, heartbeats)
        yield ranks
        ranks.gather("end of the run", None)
    except BaseException as failure:
        explained = _explained(failure, heartbeats, dist.get_rank())
        if explained is failure:
            raise
        raise explained from failure
    finally:
        heartbeats.stop()
    if is_ours:
        dist.destroy_process_group()


def _await_all(store: Any) -> None:
    """Wait until every rank has come, before what would wait for them without a word."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"here/{rank}", "1")
    deadline = time.monotonic() + _CONNECT_SECONDS
    while missing := [other for other in range(size) if not store.check([f"here/{other}"])]:
        if time.monotonic() > deadline:
            named = ", ".join(map(str, missing))
            raise RuntimeError(f"rank {named} has not come within {_CONNECT_SECONDS} s")
        time.sleep(0.1)


def _take_gpu() -> None:
    """Make the GPU of this process the one that is meant where none is named."""
    if not torch.cuda.is_available():
        return
    wanted, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if wanted >= there:
        raise UserError(f"LOCAL_RANK = {wanted}: there are {there} GPUs here; start no more processes")
    torch.cuda.set_device(wanted)


def _explained(failure: BaseException, heartbeats: Heartbeats, rank: int) -> BaseException:
    """What to raise in place of a failure, so that one rank, and one alone, tells its cause."""
    # A launcher that has noticed too asks all to end, in the middle of this.
    _ignore_signals()
    if isinstance(failure, SystemExit | KeyboardInterrupt) or _is_of_the_network(failure):
        line = heartbeats.gone()
        return failure if line is None else _silent_if(not line, RanksError(line))
    is_to_tell = heartbeats.confess(f"{type(failure).__name__}: {failure}")
    if not isinstance(failure, GadflyError):
        return failure
    named = failure if rank == 0 else type(failure)(f"rank {rank}: {failure}")
    return _silent_if(not is_to_tell, named)


def _ignore_signals() -> None:
    # Only the main thread may; under Ray this may be another.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _silent_if(another_tells: bool, error: GadflyError) -> GadflyError:
    error.is_shown_elsewhere = another_tells
    return error


def _store() -> Any:
    """A connection of its own to the store of the launch, where ranks leave notes for each other."""
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = not has_agent and not dist.is_initialized() and os.environ["RANK"] == "0"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_host,
        wait_for_workers=False,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
    )
    # A launch that starts its processes again starts with a clean slate.
    return PrefixStore(f"gadfly/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_of_the_network(failure: BaseException) -> bool:
    """Whether a failure is of talking to another rank."""
    if isinstance(failure, dist.DistError):
        return True
    inner = getattr(failure, "failures", None)
    if isinstance(inner, dict):
        # A checkpoint's: of every rank, its failure.
        return any(_is_of_the_network(cause) for cause, _ in inner.values())
    words = ("gloo", "nccl", "connection", "socket")
    return isinstance(failure, RuntimeError) and any(word in str(failure).lower() for word in words)
