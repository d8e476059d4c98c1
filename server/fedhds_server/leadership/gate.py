"""What this process's port answers: the run's calls while it leads, that it does not lead otherwise, health always."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from grpc_health.v1 import health, health_pb2

from fedhds.errors import NotLeading
from fedhds_server.coordinator import Coordinator

logger = logging.getLogger(__name__)

SERVICES = ("fedhds.v2.Federation", "fedhds.v2.Operations")
# Kinds of what keeps a coordinator from being ready; the metrics have one series for each.
PROBLEMS = ("standby", "store", "migrations", "disk")
_STATUS = health_pb2.HealthCheckResponse


class LeaderGate:
    """The time for which a coordinator leads, or stands by.

    The health service says of itself that it serves for as long as the process lives, of all else that it serves
    while this process leads and nothing is in the way of its work: liveness and readiness.
    """

    def __init__(self) -> None:
        self.health = health.aio.HealthServicer()
        self._coordinator: Coordinator | None = None
        self._problems: dict[str, str] = {}

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator of the run while this process leads."""
        return self._coordinator

    @property
    def problems(self) -> dict[str, str]:
        """What keeps this process from being ready, by its kind in `PROBLEMS`."""
        standing_by = {} if self._coordinator else {"standby": "this coordinator does not lead the run"}
        return standing_by | self._problems

    async def set_problems(self, problems: Mapping[str, str]) -> None:
        """Sets what keeps this process from being ready, whether it leads or not."""
        changed = self._problems.keys() != problems.keys()
        self._problems = dict(problems)
        if not changed:
            return
        for problem in problems.values():
            logger.warning("not ready: %s", problem)
        if not problems:
            logger.info("nothing is in the way of being ready any more")
        await self._announce()

    def leading(self) -> Coordinator:
        """The coordinator of the run; raises NotLeading while another process has it."""
        if self._coordinator is None:
            raise NotLeading("this coordinator stands by while another leads")
        return self._coordinator

    async def stand_by(self) -> None:
        """Answers that it is alive, and not ready."""
        self._coordinator = None
        await self.health.set(health.SERVICE_NAME, _STATUS.SERVING)
        await self._announce()

    @asynccontextmanager
    async def of(self, coordinator: Coordinator) -> AsyncIterator[None]:
        """Answers with `coordinator`, then stands by."""
        self._coordinator = coordinator
        await self._announce()
        try:
            yield
        finally:
            await self.stand_by()

    async def _announce(self) -> None:
        status = _STATUS.NOT_SERVING if self.problems else _STATUS.SERVING
        for name in ("", *SERVICES):
            await self.health.set(name, status)
