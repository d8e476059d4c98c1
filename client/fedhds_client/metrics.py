"""A client's metrics: read off its sites at the scrape. All are sums or extremes over the sites of the process."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from prometheus_client.core import Metric

from fedhds.errors import StorageError
from fedhds.privacy.ledger import Unit
from fedhds.runtime.metrics import Measure
from fedhds_client.counters import ENDED, ENROLLING, WAITING
from fedhds_client.policy import MAX_DELTA
from fedhds_client.rpc_client import CoordinatorClient
from fedhds_client.site import Site
from fedhds_client.tasks import TASKS

logger = logging.getLogger(__name__)

SITES = Measure("fedhds_client_sites", "gauge", "Sites of this process by what they are at.", ("activity",))
PROGRESS = Measure(
    "fedhds_client_task_progress",
    "gauge",
    "Share of the running computation that is done, 0 to 1; one site of a process computes at a time.",
    ("task",),
)
ROWS = Measure("fedhds_client_rows", "gauge", "Rows that the sites hold, to train, evaluate and validate on.", ("use",))
SENT = Measure("fedhds_client_sent_bytes_total", "counter", "Bytes of calls and uploads sent to the coordinator.")
CONNECTED = Measure(
    "fedhds_client_connected", "gauge", "1 while the coordinator answers, 0 from the first call that failed."
)
UNANSWERED = Measure(
    "fedhds_client_unanswered_seconds", "gauge", "For how long no call has been answered; --reconnect-timeout ends it."
)
EPSILON = Measure(
    "fedhds_client_epsilon",
    "gauge",
    "Largest epsilon that releases of a site's rows have cost by the ledger, adapters included, all runs together, at "
    f"delta {MAX_DELTA:g}; "
    "+Inf: something was released without noise; NaN: the ledger cannot be read.",
    ("unit",),
)
GPU_MEMORY = Measure(
    "fedhds_client_gpu_memory_bytes", "gauge", "Memory of the GPU: in tensors, reserved by torch, in all.", ("kind",)
)
MEASURES = (SITES, PROGRESS, ROWS, SENT, CONNECTED, UNANSWERED, EPSILON, GPU_MEMORY)


class SiteMetrics:
    """Reads `sites`, the `client` that they share and what each is at, with the share done."""

    def __init__(
        self, sites: Sequence[Site], client: CoordinatorClient, activities: Callable[[], Sequence[tuple[str, float]]]
    ) -> None:
        self._sites = sites
        self._client = client
        self._activities = activities
        # The ledger only grows: by site and unit its newest release when epsilon was computed, and epsilon.
        self._spent: dict[tuple[str, Unit], tuple[int, float]] = {}

    def problems(self) -> Mapping[str, str]:
        """What keeps the process from working, by kind."""
        problems = {}
        if since := self._client.unanswered_since:
            problems["link"] = f"the coordinator has not answered for {time.monotonic() - since:.0f} s"
        enrolling = sum(activity == ENROLLING for activity, _ in self._activities())
        if enrolling:
            problems["enrollment"] = f"{enrolling} of {len(self._sites)} sites are not enrolled yet"
        return problems

    def families(self) -> list[Metric]:
        """All of `MEASURES`."""
        activities = self._activities()
        counts = Counter(activity for activity, _ in activities)
        since = self._client.unanswered_since
        held_out = sum(len(site.held_out) for site in self._sites if site.held_out)
        return [
            SITES.of({activity: counts[activity] for activity in (ENROLLING, WAITING, *TASKS, ENDED)}),
            PROGRESS.of({kind: max((share for at, share in activities if at == kind), default=0.0) for kind in TASKS}),
            ROWS.of(
                {
                    "train": sum(site.rows for site in self._sites),
                    "evaluate": held_out,
                    "validate": sum(len(site.validation) for site in self._sites if site.validation),
                }
            ),
            SENT.of(self._client.bytes_sent),
            CONNECTED.of(float(since is None)),
            UNANSWERED.of(time.monotonic() - since if since else 0.0),
            EPSILON.of({unit: max(self._epsilon(site, unit) for site in self._sites) for unit in get_args(Unit)}),
            GPU_MEMORY.of(_gpu_memory()),
        ]

    def _epsilon(self, site: Site, unit: Unit) -> float:
        try:
            size = site.account.size()
            spent = self._spent.get((site.name, unit))
            if spent is None or spent[0] != size:
                spent = self._spent[site.name, unit] = size, site.account.spent(delta=MAX_DELTA, unit=unit)
        except StorageError as error:
            logger.debug("%s", error)
            return float("nan")
        return spent[1]


def _gpu_memory() -> Mapping[str, float]:
    """Empty without a GPU in use; asking must not be what imports torch or starts CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    _, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "total": total}
