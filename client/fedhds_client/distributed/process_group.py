"""The processes of one site under `accelerate launch`: a leader, and workers that take a share of feature extraction.

Only the leader talks to the coordinator, trains and evaluates. Workers load the same model and shards and wait for
commands. Commands, features and errors travel as arrays of integers, floats and bytes. Nothing is pickled, so no
process can make another one run code. A group of one process needs neither accelerate nor torch.distributed.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhds.errors import AdapterError, ArtifactError, FedhdsError, ModelError, StorageError, TaskError

logger = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float32]
"""(n_rows, dimension)"""

# A worker waits as long as the coordinator takes between two tasks. accelerate ends the group when a process is lost.
_TIMEOUT = timedelta(days=365)
# What extraction raises on purpose. The leader raises these as what they were at the worker; their text may leave the
# site, so every other class becomes a WorkerError.
_ERRORS: dict[str, type[FedhdsError]] = {
    kind.__name__: kind for kind in (TaskError, ModelError, ArtifactError, AdapterError, StorageError)
}


_OPEN_STORE = (
    "accelerate's store listens at port %s on all interfaces of this host, for everybody who reaches it; close it to "
    "other hosts, or start with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 accelerate launch --rdzv_backend=c10d "
    "--rdzv_conf=store_type=file"
)


class WorkerError(Exception):
    """A worker failed in a way that fedhds does not raise on purpose, or sent features of a wrong shape.

    Not a FedhdsError: its text may hold data of the site, which must stay in the site's log.
    """


@dataclass(frozen=True)
class Prepare:
    """Load the models that the run's specification names."""

    spec: bytes
    """The serialized specification."""


@dataclass(frozen=True)
class Extract:
    """Extract features of rows of one shard; every process takes its share of them."""

    shard: int
    """Index of the shard in the order of `--data`."""
    rows: tuple[int, ...]
    adapter: bytes
    """The adapter's safetensors file, empty when the features do not depend on it."""


@dataclass(frozen=True)
class Stop:
    """End the process."""


Command = Prepare | Extract | Stop


class ProcessGroup:
    """This process's place, `rank`, among the `size` processes of a site; rank 0 is the leader."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def join(cls, device: str) -> ProcessGroup:
        """Joins the group that accelerate started, or makes a group of one; `device` is auto, cpu or cuda."""
        size = os.environ.get("WORLD_SIZE", "1")
        if int(size) == 1:
            return cls(0, 1)
        import torch
        from accelerate import PartialState

        if os.environ.get("LOCAL_WORLD_SIZE") == size:
            # All processes are on this host: no other host needs to reach them.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # It was opened before this process began.
                logger.warning(_OPEN_STORE, os.environ.get("MASTER_PORT"))
            else:
                _join_on_loopback(int(os.environ["RANK"]), int(size), int(os.environ["MASTER_PORT"]))
        # Without a GPU and without `cpu`, accelerate would take every process for one alone. Gloo also with GPUs: what
        # is exchanged is small and in main memory, and NCCL would keep the GPUs busy while workers wait.
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), backend="gloo", timeout=_TIMEOUT)
        return cls(state.process_index, state.num_processes)

    @property
    def is_leader(self) -> bool:
        """Whether this process is the one that talks to the coordinator."""
        return self.rank == 0

    def close(self) -> None:
        """Leaves the group. Its threads would otherwise abort an interpreter that exits."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()

    def broadcast(self, command: Command) -> None:
        """Sends a command from the leader to all workers."""
        if self.size == 1:
            return
        match command:
            case Prepare(spec=content):
                kind, shard, rows = 0, 0, ()
            case Extract(shard=shard, rows=rows, adapter=content):
                kind = 1
            case Stop():
                kind, shard, rows, content = 2, 0, (), b""
        _broadcast(np.array([kind, shard, len(rows), len(content)], dtype=np.int64))
        _broadcast(np.array(rows, dtype=np.int64))
        _broadcast(_as_array(content))

    def receive(self) -> Command:
        """Waits, at a worker, for the leader's next command; raises WorkerError for one that is not known."""
        kind, shard, n_rows, length = _broadcast(np.empty(4, dtype=np.int64)).tolist()
        rows = _broadcast(np.empty(n_rows, dtype=np.int64))
        content = _broadcast(np.empty(length, dtype=np.uint8)).tobytes()
        match kind:
            case 0:
                return Prepare(content)
            case 1:
                return Extract(shard, tuple(rows.tolist()), content)
            case 2:
                return Stop()
        raise WorkerError(f"the leader sent command {kind}, which is not known; start all processes from one version")

    def gather(self, rows: Sequence[int], extract: Callable[[Sequence[int]], Matrix]) -> Matrix:
        """Extracts the leader's share of `rows` and collects the workers' shares, in the order of `rows`.

        Raises the error of the first process that failed, after all are done.
        """
        if self.size == 1:
            return extract(rows)
        parts = [_attempt(extract, self._share(rows)), *(_receive_part(rank) for rank in range(1, self.size))]
        for part in parts:
            if isinstance(part, Exception):
                raise part
        values = np.empty((len(rows), parts[0].shape[1]), dtype=np.float32)
        for rank, part in enumerate(parts):
            place = values[rank :: self.size]
            if part.shape != place.shape:
                raise WorkerError(f"process {rank} sent features of shape {part.shape} instead of {place.shape}")
            place[:] = part
        return values

    def contribute(self, rows: Sequence[int], extract: Callable[[Sequence[int]], Matrix]) -> None:
        """Extracts this worker's share of `rows` and sends the features, or what went wrong, to the leader."""
        part = _attempt(extract, self._share(rows))
        if isinstance(part, Exception):
            expected = isinstance(part, FedhdsError)
            logger.error("process %d: %s", self.rank, part, exc_info=None if expected else part)
            text = _as_array(f"{type(part).__name__}\n{part}".encode())
            _send(np.array([1, text.size, 0], dtype=np.int64))
            _send(text)
        else:
            _send(np.array([0, *part.shape], dtype=np.int64))
            _send(part)

    def _share(self, rows: Sequence[int]) -> Sequence[int]:
        """Every size-th row, so that long rows, which often lie together, spread over all processes."""
        return rows[self.rank :: self.size]


def _join_on_loopback(rank: int, size: int, port: int) -> None:
    """Joins the group by a store that only this host reaches; by itself torch would listen on all interfaces."""
    import torch.distributed

    # The store takes the descriptor over.
    listening = None if rank else socket.create_server(("127.0.0.1", port)).detach()
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # torch names it in no __all__
        "127.0.0.1", port, size, is_master=not rank, master_listen_fd=listening, timeout=_TIMEOUT
    )
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def _attempt(extract: Callable[[Sequence[int]], Matrix], rows: Sequence[int]) -> Any:
    """The features of `rows`, or the error: the other processes wait for one of the two."""
    try:
        return extract(rows)
    except Exception as error:  # noqa: BLE001 - raised again at the leader
        return error


def _receive_part(rank: int) -> Any:
    """What the worker `rank` contributes: features, or an error."""
    failed, n_rows, dimension = _receive(np.empty(3, dtype=np.int64), rank).tolist()
    if not failed:
        return _receive(np.empty((n_rows, dimension), dtype=np.float32), rank)
    content = _receive(np.empty(n_rows, dtype=np.uint8), rank).tobytes()
    name, _, text = content.decode(errors="replace").partition("\n")
    return _ERRORS[name](text) if name in _ERRORS else WorkerError(f"process {rank} failed: {name}: {text}")


def _as_array(content: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytearray(content), dtype=np.uint8)


def _broadcast(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sends the leader's array, or fills a worker's array with it."""
    import torch

    if array.size:
        torch.distributed.broadcast(torch.from_numpy(array), src=0)
    return array


def _send(array: npt.NDArray[Any]) -> None:
    import torch

    if array.size:
        torch.distributed.send(torch.from_numpy(np.ascontiguousarray(array)), dst=0)


def _receive(array: npt.NDArray[Any], rank: int) -> npt.NDArray[Any]:
    import torch

    if array.size:
        torch.distributed.recv(torch.from_numpy(array), src=rank)
    return array
