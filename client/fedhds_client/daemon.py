"""A process of one or more sites: opened, run to the end of the run, and closed in order."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial

from fedhds.runtime.liveness import watch_loop
from fedhds.runtime.signals import on_signal
from fedhds.security.credentials import TlsFiles
from fedhds_client.computation import ComputeThread, Control
from fedhds_client.counters import ENROLLING
from fedhds_client.distributed.process_group import ProcessGroup
from fedhds_client.executor import TaskExecutor
from fedhds_client.progress import ProgressDisplay
from fedhds_client.rpc_client import CoordinatorClient
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site, open_sites
from fedhds_client.site_loop import SiteLoop
from fedhds_client.updates.personal import PersonalJob

logger = logging.getLogger(__name__)

# A coordinator that is there answers sooner; a name that it refuses then costs no import.
_IMPORT_AFTER_S = 1.0


async def run_sites(settings: ClientSettings) -> int:
    """Runs all sites of this process to the end of the run; returns the exit status."""
    tls = TlsFiles.from_settings(settings.tls_ca, settings.tls_cert, settings.tls_key)
    group = ProcessGroup.join(settings.device)
    if not group.is_leader:
        from fedhds_client.distributed.worker import run_worker

        return await asyncio.to_thread(run_worker, settings, group)
    with ExitStack() as stack:
        sites = open_sites(settings, tls, stack)
        client = CoordinatorClient(settings.server, tls, reconnect_timeout_s=settings.reconnect_timeout)
        worker = ComputeThread()
        executor = TaskExecutor(settings, sites, group)
        display = ProgressDisplay()
        # Sites that were stopped behind the end of their run need no coordinator for what is left.
        behind = [site for site in sites if settings.personalize and PersonalJob.pending(site.folder)]
        others = [site for site in sites if site not in behind]
        loops = [SiteLoop(site, client, executor, worker, settings, display) for site in others]
        tasks = [asyncio.create_task(loop.run()) for loop in loops]

        def stop() -> None:
            for task in tasks:
                task.cancel()

        exit_status = on_signal(stop)
        importing = asyncio.create_task(_import_while_waiting(loops, worker))
        try:
            async with _watched(settings.http, sites, loops, client):
                outcomes = await asyncio.gather(*tasks)
                if settings.personalize:
                    # The coordinator does not wait for it.
                    await asyncio.gather(*(loop.leave(None) for loop in loops))
                    tasks.append(asyncio.create_task(_personalize(sites, executor, worker, display)))
                    outcomes.append(await tasks[-1])
        except asyncio.CancelledError:
            logger.info("stopped; start again to go on")
            return exit_status()
        finally:
            for loop in loops:
                loop.abandon()
            importing.cancel()
            stop()
            await asyncio.gather(*tasks, return_exceptions=True)
            # What ends one site ends the process, and so the others.
            failure = next((loop.failure for loop in loops if loop.failure), None)
            await asyncio.gather(*(loop.leave(failure) for loop in loops))
            await client.close()
            await asyncio.to_thread(worker.shutdown)
            executor.close()
            logger.info("sent %.2f MB", client.bytes_sent / 1e6)
        return 0 if all(outcomes) else 1


async def _personalize(
    sites: Sequence[Site], executor: TaskExecutor, worker: ComputeThread, display: ProgressDisplay
) -> bool:
    """Makes the personal adapter of each site that has the global one; whether all could be made."""
    well = True
    for site in sites:
        if job := PersonalJob.pending(site.folder):
            with display.work(f"{site.name}: tuning the personal adapter") as show:
                control = Control(show=show)
                try:
                    await worker.start(partial(executor.personalize, site, job), control)
                except Exception as error:
                    # Tried again, it would fail again; the global adapter is where it was delivered.
                    logger.exception("%s: there is no personal adapter (%s)", site.name, type(error).__name__)
                    well = False
                finally:
                    control.cancel()
            PersonalJob.done(site.folder)
    return well


async def _import_while_waiting(loops: Sequence[SiteLoop], worker: ComputeThread) -> None:
    """Imports what models need, which takes seconds, while no coordinator answers; what comes first in the thread that
    computes delays no computation, as every one needs it.
    """
    await asyncio.sleep(_IMPORT_AFTER_S)
    if all(loop.activity == ENROLLING for loop in loops):
        worker.submit(importlib.import_module, "fedhds_client.run_models")


@asynccontextmanager
async def _watched(
    address: str, sites: Sequence[Site], loops: Sequence[SiteLoop], client: CoordinatorClient
) -> AsyncIterator[None]:
    """Watches the event loop, and serves the process's metrics at `address`, unless that is empty."""
    watching = asyncio.create_task(watch_loop())
    try:
        async with AsyncExitStack() as stack:
            if address:
                from fedhds.runtime.http import served
                from fedhds_client.metrics import SiteMetrics

                metrics = SiteMetrics(sites, client, lambda: [(loop.activity, loop.progress) for loop in loops])
                await stack.enter_async_context(served(address, metrics.families, metrics.problems))
            yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
