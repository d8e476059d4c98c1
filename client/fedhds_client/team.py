"""The processes of one site under `accelerate launch`: one leads, the others take their share of the features.

Only the leader talks to the coordinator, trains and evaluates; the others load the same model and shards, and wait for
orders. Orders and answers stay between these processes. Without accelerate a team is one process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from fedhds_client.features import Features

# Between two orders lies whatever the coordinator takes; a lost process is accelerate's to notice.
_LONGEST_WAIT = timedelta(days=365)


@dataclass(frozen=True)
class Prepare:
    """Load what the run names."""

    spec: bytes
    """The run's specification as a serialised message."""


@dataclass(frozen=True)
class Extract:
    """Take features of these rows of the shard with that number; every process takes its share."""

    shard: int
    rows: tuple[int, ...]
    adapter: bytes
    """The adapter's safetensors file, empty where the features do not depend on it."""


@dataclass(frozen=True)
class Stop:
    """The site ends."""


Order = Prepare | Extract | Stop


class Team:
    """A process's place among `size` processes; number 0 leads."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def joined(cls, device: str) -> Team:
        """The team that accelerate started, or a team of one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1)
        import torch
        from accelerate import PartialState

        # Said aloud: without a GPU and without being told, accelerate takes every process for one alone.
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
        return cls(state.process_index, state.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that the coordinator knows."""
        return self.rank == 0

    def dissolved(self) -> None:
        """Ends the processes' ties: their threads would else abort an interpreter that ends."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """This process's part of `rows`: every size-th one, so that long rows spread over all."""
        return rows[self.rank :: self.size]

    def order(self, order: Order | None = None) -> Order:
        """The leader gives an order, the others get it."""
        if self.size == 1:
            assert order is not None
            return order
        import torch.distributed

        box: list[Any] = [order]
        torch.distributed.broadcast_object_list(box, src=0)
        given: Order = box[0]
        return given

    def gathered(self, part: Features | Exception) -> Features | None:
        """All processes' features in the order of the rows that were shared out; None but at the leader.

        Raises the first process's error, at the leader.
        """
        parts: list[Any] = [part]
        if self.size > 1:
            import torch.distributed

            parts = [None] * self.size
            torch.distributed.gather_object(part, parts if self.leads else None)
            if not self.leads:
                return None
        for one in parts:
            if isinstance(one, Exception):
                raise one
        whole = sum(len(one.ids) for one in parts)
        ids = np.empty(whole, dtype=np.int64)
        values = np.empty((whole, parts[0].values.shape[1]), dtype=np.float32)
        for rank, one in enumerate(parts):
            ids[rank :: self.size] = one.ids
            values[rank :: self.size] = one.values
        return Features(ids, values)
