"""How weights reach vLLM servers: through vLLM's own NCCL transfer, or a folder that both sides see.

Both need servers in `VLLM_SERVER_DEV_MODE=1`. The folder has been run, on CPUs; the transfer by NCCL has not,
for want of GPUs: what is tested of it is what each server is sent over HTTP.
"""

import importlib
import importlib.util
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gadfly.disk_refusals import refusal_in
from gadfly.errors import ApiError, GadflyError, UserError
from gadfly.samplers.vllm_http import Body, Connection, Server, ServerLost, at_once

logger = logging.getLogger(__name__)

Weights = Iterable[tuple[str, Tensor]]

# Gathered and handed over together; more is no faster, and all of a large model would not fit.
_CHUNK_BYTES = 2**30


@runtime_checkable
class HandOver(Protocol):
    """A way for weights to reach servers that are paused."""

    def send(self, servers: Sequence[Server], weights: Weights) -> None:
        """Hand weights to all of them; one that cannot take them is marked as lost, or ends it all."""
        ...


def open_hand_over(folder: Path) -> HandOver:
    """NCCL where this process has a GPU and vLLM, else files in a folder that the servers see too."""
    if torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
        logger.info("sampling.servers: weights go there by NCCL")
        return NcclHandOver()
    logger.info("sampling.servers: weights go there through files in %s", folder)
    return FolderHandOver(folder)


class FolderHandOver:
    """Weights as safetensors files that every server reads; they are gone again when it has.

    Args:
        folder: of the same name and with the same files on this machine and on those of the servers.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        # Of a process that was killed amid a hand-over.
        for left in self._folder.glob("weights-*"):
            shutil.rmtree(left, ignore_errors=True)

    def send(self, servers: Sequence[Server], weights: Weights) -> None:
        """Write the weights, and have the servers read them.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # A new name each time, so that no file system can answer with files it remembers.
            with TemporaryDirectory(prefix="weights-", dir=self._folder) as name:
                # The servers may belong to another user.
                Path(name).chmod(0o755)
                for number, chunk in enumerate(_chunks(weights)):
                    # A file may not hold one memory twice.
                    tensors = {key: value.to("cpu", copy=True).contiguous() for key, value in chunk}
                    save_file(tensors, Path(name) / f"model-{number:05d}.safetensors")
                self._have_read(servers, name)
        except (OSError, SafetensorError) as failure:
            raise UserError(
                f"sampling.servers: cannot write weights to {self._folder}: {refusal_in(failure)}"
            ) from failure

    @staticmethod
    def _have_read(servers: Sequence[Server], name: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": name}}

        async def read(connection: Connection) -> None:
            try:
                await connection.post("/collective_rpc", f"to read weights from {name}", body, once=True)
            except ServerLost as loss:
                logger.debug("%s", loss)

        at_once(servers, read)


class NcclHandOver:
    """Weights from GPU to GPU, sent to all servers at once by vLLM's trainer-side engine.

    It takes vLLM 0.28 or newer on both sides. The address of this machine that servers are told is
    `VLLM_HOST_IP`, or else what vLLM finds.
    """

    def __init__(self) -> None:
        self._servers: tuple[Server, ...] = ()
        self._chunk = _Chunk()
        self._client: AllServers | None = None
        self._engine: Any = None

    def send(self, servers: Sequence[Server], weights: Weights) -> None:
        """Hand over chunk by chunk.

        Raises:
            UserError: this machine's vLLM is too old.
            ApiError: a server failed or was not heard of in time; the group of all is of no more use then.
        """
        # A group of processes is for good: with a server less it is another one.
        if self._client is None or tuple(servers) != self._servers:
            self._open(servers)
        assert self._client is not None
        self._client.begin()
        for chunk in _chunks(weights):
            self._chunk.weights = chunk
            # Another thread sends them, which does not wait for what this one has under way.
            torch.cuda.current_stream().synchronize()
            self._within_time(self._engine.send_weights, "to receive weights")
        self._chunk.weights = []
        self._client.end()

    def _open(self, servers: Sequence[Server]) -> None:
        nccl, network, transfer = (
            importlib.import_module(f"vllm.{name}")
            for name in (
                "distributed.weight_transfer.nccl_engine",
                "utils.network_utils",
                "distributed.weight_transfer",
            )
        )
        if not hasattr(nccl, "NCCLTrainerInitInfo"):
            raise UserError(
                "sampling.servers: weights go by NCCL with vLLM 0.28 or newer; pip install -U vllm"
            )
        if self._engine is not None:
            self._within_time(self._engine.shutdown, "to part")
        self._servers = tuple(servers)
        self._client = AllServers(servers)
        init_info = nccl.NCCLTrainerInitInfo(
            master_address=network.get_ip(),
            master_port=network.get_open_port(),
            world_size=1 + sum(self._client.num_workers),
            rank=0,
        )
        trainer_init = transfer.WeightTransferTrainerFactory.trainer_init
        self._engine = self._within_time(
            lambda: trainer_init(init_info, client=self._client, source=self._chunk), "to form a group"
        )

    def _within_time(self, work: Callable[[], Any], wanted: str) -> Any:
        """Do what blocks for as long as any server does, but not for ever."""
        outcome: Future[Any] = Future()
        device = torch.cuda.current_device()

        def run() -> None:
            torch.cuda.set_device(device)
            try:
                outcome.set_result(work())
            except BaseException as failure:
                outcome.set_exception(failure)

        # A daemon, since a call of NCCL that a server has left never returns.
        threading.Thread(target=run, daemon=True).start()
        urls = ", ".join(server.url for server in self._servers)
        seconds = max(server.timeout_seconds for server in self._servers)
        try:
            return outcome.result(seconds)
        except TimeoutError:
            raise ApiError(f"{urls} were asked {wanted} by NCCL: not done within {seconds:g} s") from None
        except GadflyError:
            raise
        except Exception as failure:
            # Of every kind: from NCCL, from sockets, from vLLM.
            reason = (str(failure).strip() or repr(failure)).splitlines()[0]
            raise ApiError(f"{urls} were asked {wanted} by NCCL: {reason}") from failure


class AllServers:
    """Several servers as the one that vLLM's trainer-side engine talks to (its `VLLMWeightSyncClient`).

    The engine begins and ends an update with each of its sources; here several chunks are one update, from
    `begin` to `end`.

    Raises:
        ApiError: from every method, as soon as one server fails.
    """

    def __init__(self, servers: Sequence[Server]):
        self._servers = servers

        async def num_workers(connection: Connection) -> int:
            answer = await connection.get("/get_world_size", "for its number of workers")
            return int(answer["world_size"])

        self.num_workers = at_once(servers, num_workers)

    def begin(self) -> None:
        """Have them expect weights."""
        self._post("/start_weight_update", "to expect weights", {})

    def end(self) -> None:
        """Have them take into use what they received."""
        self._post("/finish_weight_update", "to use the weights", {})

    def init_weight_transfer_engine(self, init_info: Body) -> None:
        """Have every worker join the group, each server's in the places after those of the one before."""
        # Each after all workers of the servers before it, and the first after the trainer.
        offsets = accumulate(self.num_workers, initial=init_info["rank_offset"])
        places = dict(zip(self._servers, offsets, strict=False))

        async def join(connection: Connection) -> None:
            own = {**init_info, "rank_offset": places[connection.server]}
            wanted = 'to join the group by NCCL (--weight-transfer-config \'{"backend": "nccl"}\')'
            await connection.post("/init_weight_transfer_engine", wanted, {"init_info": own}, once=True)

        at_once(self._servers, join)

    def start_weight_update(self) -> None:
        """Nothing: `begin` did."""

    def update_weights(self, update_info: Body | list[Body]) -> None:
        """Have them receive a chunk."""
        self._post("/update_weights", "to receive weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing: `end` will."""

    def _post(self, path: str, wanted: str, body: Body) -> None:
        at_once(self._servers, lambda connection: connection.post(path, wanted, body, once=True))


class _Chunk:
    """Some weights as vLLM's trainer-side engine reads them (its `WeightSource`)."""

    def __init__(self) -> None:
        self.weights: list[tuple[str, Tensor]] = []

    def metadata(self) -> list[Any]:
        base = importlib.import_module("vllm.distributed.weight_transfer")
        return [base.ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self.weights]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights)


def _chunks(weights: Weights) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in their order, about as many at a time as are gathered at once."""
    chunk: list[tuple[str, Tensor]] = []
    for name, value in weights:
        chunk.append((name, value.detach()))
        if sum(weight.nbytes for _, weight in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
