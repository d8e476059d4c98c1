"""What this process's port answers: the run's calls while it leads, that it does not lead otherwise, health always."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc_health.v1 import health, health_pb2

from fedhds.errors import NotLeading
from fedhds_server.coordinator import Coordinator

SERVICES = ("fedhds.v1.Federation", "fedhds.v1.Operations")
_STATUS = health_pb2.HealthCheckResponse


class Term:
    """The time for which a coordinator leads, or stands by.

    The health service says of itself that it serves for as long as the process lives, of all else that it serves
    while this process leads: liveness and readiness.
    """

    def __init__(self) -> None:
        self.health = health.aio.HealthServicer()
        self._coordinator: Coordinator | None = None

    def leading(self) -> Coordinator:
        """The coordinator of the run; raises NotLeading while another process has it."""
        if self._coordinator is None:
            raise NotLeading("this coordinator stands by while another leads")
        return self._coordinator

    async def stand_by(self) -> None:
        """Answers that it is alive, and not ready."""
        self._coordinator = None
        await self.health.set(health.SERVICE_NAME, _STATUS.SERVING)
        for name in ("", *SERVICES):
            await self.health.set(name, _STATUS.NOT_SERVING)

    @asynccontextmanager
    async def of(self, coordinator: Coordinator) -> AsyncIterator[None]:
        """Answers with `coordinator`, then stands by."""
        self._coordinator = coordinator
        for name in ("", *SERVICES):
            await self.health.set(name, _STATUS.SERVING)
        try:
            yield
        finally:
            await self.stand_by()
