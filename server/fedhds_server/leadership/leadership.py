"""Which of several coordinators leads: by a lease in the store, kept while the work goes on, given up when it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fedhds.errors import NotLeading, StorageError
from fedhds_server.storage.base import Store

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A standby takes over this long after the leader's last sign of life. Shorter, and a database that is slow for a
# moment (a checkpoint, a failover of its own) would change the leader.
LEASE_S = 5.0
_RENEW_S = 1.0
_ASK_S = 0.5


class Leadership:
    """One coordinator's part in the election; no two processes that run have the same `holder`."""

    def __init__(self, store: Store, holder: str, address: str) -> None:
        self._store = store
        self._holder = holder
        self._address = address
        # A thread of its own: behind aggregations and uploads the renewals would come too late.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lease")
        self.leader = ""
        """Address of the coordinator that this one stands by for; empty: unknown, or none."""
        self._asked = False
        self._confirmed = 0.0

    async def gained(self) -> None:
        """Returns once this coordinator leads; raises StorageError when the store has never been usable."""
        self.leader, failing = "", False
        while True:
            started = time.monotonic()
            try:
                if await self._run(self._store.acquire, self._holder, self._address, LEASE_S):
                    self._asked, self._confirmed, self.leader = True, started, ""
                    return
                leader = await self._run(self._store.leader)
            except StorageError as error:
                if not self._asked:
                    raise
                if not failing:
                    logger.error("%s; trying again", error)
                failing = True
            else:
                if leader and leader != self.leader:
                    logger.info("standing by: the coordinator at %s leads", leader)
                self.leader, failing = leader or self.leader, False
            self._asked = True
            await asyncio.sleep(_ASK_S)

    async def kept_during(self, work: Coroutine[Any, Any, None]) -> None:
        """Works while this coordinator leads; raises NotLeading, and cancels the work, when it cannot be sure of it."""
        tasks = [asyncio.create_task(work), asyncio.create_task(self._renewed())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def given_up(self) -> None:
        """Lets another lead at once; where that fails, it waits until the lease has run out."""
        try:
            async with asyncio.timeout(LEASE_S):
                await self._run(self._store.release)
        except (StorageError, TimeoutError) as error:
            logger.warning("the lease could not be given up, it runs out by itself: %s", error or "no answer")

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _renewed(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            started, reason = time.monotonic(), "the state database does not answer"
            # The answer may never come, and this coordinator must not go on answering its sites. After a standstill
            # there is time for one question all the same, as its answer says who leads.
            remaining = max(self._confirmed + LEASE_S - started, _RENEW_S)
            try:
                async with asyncio.timeout(remaining):
                    await self._run(self._store.renew)
                self._confirmed = started
            except TimeoutError:
                pass
            except StorageError as error:
                reason = str(error)
            if time.monotonic() > self._confirmed + LEASE_S:
                raise NotLeading(f"the lease could not be renewed for {LEASE_S:g} s: {reason}")

    async def _run(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
