"""A process of one or more sites: enrol, work through tasks, deliver, stop."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fedhds import PROTOCOL_VERSIONS, __version__
from fedhds.errors import (
    ArtifactError,
    CoordinatorUnreachable,
    EnrolmentRefused,
    Evicted,
    FedhdsError,
    SessionLost,
    StorageError,
)
from fedhds.liveness import watch_loop
from fedhds.runspec import RunSpec
from fedhds.security.credentials import TlsFiles
from fedhds.signals import on_signal
from fedhds.telemetry import about
from fedhds.v1 import federation_pb2 as pb
from fedhds_client.computation import Cancelled, Control
from fedhds_client.counted import TASK_FAILURES, TASK_SECONDS, Activity
from fedhds_client.delivery import write_adapter_folder
from fedhds_client.distributed.process_group import ProcessGroup
from fedhds_client.link import CoordinatorLink
from fedhds_client.progress import Shown
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site, open_sites
from fedhds_client.workbench import Workbench

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_POLL_S = 25.0
# A process that ends tells the coordinator, but does not wait for one that is gone.
_FAREWELL_S = 2.0
_STORAGE_RETRY_S = 5.0
_ENDS = (SessionLost, CoordinatorUnreachable, EnrolmentRefused)


async def run_sites(chosen: ClientSettings) -> int:
    """Runs all sites of this process to the end of the run; returns the exit status."""
    tls = TlsFiles.from_settings(chosen.tls_ca, chosen.tls_cert, chosen.tls_key)
    group = ProcessGroup.join(chosen.device)
    if not group.is_leader:
        from fedhds_client.distributed.worker import run_worker

        return await asyncio.to_thread(run_worker, chosen, group)
    with ExitStack() as stack:
        sites = open_sites(chosen, tls, stack)
        link = CoordinatorLink(chosen.server, tls, patience=chosen.patience)
        # One thread: all sites share one model, and their computations take turns.
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        workbench = Workbench(chosen, sites, group)
        shown = Shown()
        loops = [SiteLoop(site, link, workbench, worker, chosen, shown) for site in sites]
        tasks = [asyncio.create_task(loop.run()) for loop in loops]

        def stop() -> None:
            for task in tasks:
                task.cancel()

        exit_status = on_signal(stop)
        try:
            async with _watched(chosen.http, sites, loops, link):
                outcomes = await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            logger.info("stopped; start again to go on")
            return exit_status()
        finally:
            for loop in loops:
                loop.abandon()
            stop()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(loop.farewell() for loop in loops))
            await link.close()
            await asyncio.to_thread(worker.shutdown)
            workbench.close()
            logger.info("sent %.2f MB", link.bytes_sent / 1e6)
        return 0 if all(outcomes) else 1


@asynccontextmanager
async def _watched(
    address: str, sites: Sequence[Site], loops: Sequence[SiteLoop], link: CoordinatorLink
) -> AsyncIterator[None]:
    """Looks after the process, and tells of it at `address`, unless that is empty."""
    watching = asyncio.create_task(watch_loop())
    try:
        async with AsyncExitStack() as stack:
            if address:
                from fedhds.web import served
                from fedhds_client.metrics import SiteMetrics

                metrics = SiteMetrics(sites, link, lambda: [(loop.activity, loop.progress) for loop in loops])
                await stack.enter_async_context(served(address, metrics.families, metrics.problems))
            yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


class SiteLoop:
    """One site's life: enrol, attest, then task after task until the run is over."""

    def __init__(
        self,
        site: Site,
        link: CoordinatorLink,
        workbench: Workbench,
        worker: ThreadPoolExecutor,
        chosen: ClientSettings,
        shown: Shown,
    ) -> None:
        self._site = site
        self._link = link
        self._workbench = workbench
        self._worker = worker
        self._chosen = chosen
        self._shown = shown
        self._session = ""
        self._lease_s = 60.0
        self._run_id = ""
        self._round = 0
        self._control: Control | None = None
        self._blocked_since = 0.0
        self.activity = Activity.ENROLLING

    @property
    def progress(self) -> float:
        """The share of the current computation that is done, 0 to 1."""
        return self._control.progress if self._control else 0.0

    async def run(self) -> bool:
        """Whether the run ended as it should; raises FedhdsError when the site cannot go on."""
        about(lambda: {"run": self._run_id, "site": self._site.name, "round": self._round})
        try:
            return await self._live()
        except Evicted as error:
            # The other sites of this process go on.
            logger.error("%s: %s", self._site.name, error)
            return False
        finally:
            self.activity = Activity.ENDED

    async def _live(self) -> bool:
        await self._enrol()
        self.activity = Activity.WAITING
        reason = ""
        # A poll that is held longer than the lease would look like silence.
        wait_s = min(_POLL_S, self._lease_s / 3)
        while True:
            request = pb.NextTaskRequest(session=self._session, wait_s=wait_s)
            task = await self._link.call(self._link.federation.NextTask, request, wait_s=wait_s)
            match task.WhichOneof("task"):
                case "wait":
                    if task.wait.reason != reason:
                        reason = task.wait.reason
                        logger.info("%s: %s", self._site.name, reason or "waiting")
                case "done":
                    return await self._finish(task)
                case "select" | "train" | "evaluate" as kind:
                    reason = ""
                    self.activity, self._round = Activity(kind), task.round
                    with TASK_SECONDS.labels(kind).time():
                        await self._work(task, kind)
                    self.activity = Activity.WAITING
                case other:
                    raise FedhdsError(f"the coordinator gave a task that this version does not know ({other})")

    def abandon(self) -> None:
        """Asks a running computation to stop."""
        if self._control:
            self._control.cancel()

    async def farewell(self) -> None:
        """Tells the coordinator that the site stops, if it can be reached at once."""
        if not self._session:
            return
        request = pb.LeaveRequest(session=self._session)
        try:
            await self._link.federation.Leave(request, timeout=_FAREWELL_S)
        except Exception as error:  # noqa: BLE001 - nothing depends on it: the lease ends by itself
            logger.debug("no farewell: %s", type(error).__name__)

    async def _enrol(self) -> None:
        request = pb.EnrollRequest(
            site=self._site.name,
            protocol_versions=PROTOCOL_VERSIONS,
            fedhds_version=__version__,
            previous_session=self._site.session(),
            session=self._site.next_session(),
        )
        answer = await self._link.call(self._link.federation.Enroll, request)
        self._session, self._lease_s, self._run_id = answer.session, answer.lease_s, answer.run_id
        self._site.keep_session()
        spec = RunSpec.from_proto(answer.run)
        logger.info(
            "%s: enrolled in run %s (%s, %d rounds of %s)",
            self._site.name,
            self._run_id,
            spec.model,
            spec.rounds,
            spec.strategy,
        )
        fingerprint, manifest = await self._computed("", lambda _: self._workbench.prepare(spec))
        attestation = pb.AttestRequest(
            session=self._session,
            fingerprint=fingerprint,
            manifest=manifest.to_proto(),
            rows=self._site.rows,
            evaluates=self._site.evaluates,
        )
        await self._link.call(self._link.federation.Attest, attestation)

    async def _work(self, task: pb.NextTaskResponse, kind: str) -> None:
        try:
            answer = await self._result(task, kind)
        except _ENDS:
            raise
        except Cancelled:
            logger.info("%s: %s task of round %d is no longer wanted", self._site.name, kind, task.round)
        except StorageError as error:
            # People free disks in minutes; a task that failed at once would cost the site its rounds meanwhile.
            now = asyncio.get_running_loop().time()
            self._blocked_since = self._blocked_since or now
            logger.error("%s: %s task of round %d: %s", self._site.name, kind, task.round, error)
            if now - self._blocked_since > self._chosen.patience:
                await self._fail(task, kind, error, str(error))
            else:
                logger.info("%s: trying again in %.0f s", self._site.name, _STORAGE_RETRY_S)
                await asyncio.sleep(min(_STORAGE_RETRY_S, self._lease_s / 3))
        except FedhdsError as error:
            logger.error("%s: %s task of round %d failed: %s", self._site.name, kind, task.round, error)
            await self._fail(task, kind, error, str(error))
        except Exception as error:
            # Whatever a library throws must not end the site, nor leave it: its text could hold data.
            logger.exception("%s: %s task of round %d failed", self._site.name, kind, task.round)
            await self._fail(task, kind, error, "the site's log has the details")
        else:
            self._blocked_since = 0.0
            if not answer.accepted:
                logger.warning("%s: the coordinator did not take the result: %s", self._site.name, answer.reason)

    async def _result(self, task: pb.NextTaskResponse, kind: str) -> pb.CompleteTaskResponse:
        request = pb.CompleteTaskRequest(session=self._session, task_id=task.task_id)
        run_id, site = self._run_id, self._site
        adapter = await self._fetched(task, getattr(task, kind).adapter)
        match kind:
            case "select":
                report = await self._beating(
                    task, "selecting", lambda control: self._workbench.select(site, run_id, task, adapter, control)
                )
                if isinstance(report, pb.CellReport):
                    request.cells.CopyFrom(report)
                else:
                    request.clusters.CopyFrom(report)
            case "train":
                trained = await self._beating(
                    task, "training", lambda control: self._workbench.train(site, run_id, task, adapter, control)
                )
                if trained:
                    with self._work_shown(task, "sending the update") as show:
                        upload = self._link.upload(self._session, trained.path, trained.artifact, show)
                        await self._transferring(task.task_id, upload)
                request.train.CopyFrom(trained.result() if trained else pb.TrainResult())
            case "evaluate":
                sums = await self._beating(
                    task, "evaluating", lambda control: self._workbench.evaluate(site, task.round, adapter, control)
                )
                request.evaluation.CopyFrom(sums)
        answer: pb.CompleteTaskResponse
        try:
            answer = await self._link.call(self._link.federation.CompleteTask, request)
        except ArtifactError as error:
            if kind != "train" or not trained:
                raise
            # A coordinator that took over, or found the bytes damaged, asks for what was uploaded once more.
            logger.warning("%s: %s", site.name, error)
            await self._link.upload(self._session, trained.path, trained.artifact)
            answer = await self._link.call(self._link.federation.CompleteTask, request)
        if kind == "train" and trained:
            trained.path.unlink(missing_ok=True)
        return answer

    async def _finish(self, task: pb.NextTaskResponse) -> bool:
        done = task.done
        if done.HasField("adapter"):
            adapter = await self._fetched(task, done.adapter)
            await asyncio.to_thread(
                write_adapter_folder, self._chosen.out, adapter, done.adapter_config, done.model_card
            )
            logger.info("%s: the final adapter is in %s", self._site.name, self._chosen.out)
        request = pb.CompleteTaskRequest(session=self._session, task_id=task.task_id, delivered=pb.Delivered())
        await self._link.call(self._link.federation.CompleteTask, request)
        failed = done.outcome == "failed"
        verb = "is stopped" if done.outcome == "stopped" else done.outcome
        level = logging.ERROR if failed else logging.INFO
        logger.log(level, "%s: the run %s: %s", self._site.name, verb, done.message)
        return not failed

    async def _fail(self, task: pb.NextTaskResponse, kind: str, error: Exception, reason: str) -> None:
        name = type(error).__name__
        TASK_FAILURES.labels(kind, name).inc()
        request = pb.FailTaskRequest(session=self._session, task_id=task.task_id, kind=name, reason=reason)
        await self._link.call(self._link.federation.FailTask, request)

    def _work_shown(self, task: pb.NextTaskResponse, doing: str) -> AbstractContextManager[Callable[[float], None]]:
        return self._shown.work(f"{self._site.name}: {doing}" + f", round {task.round}" * bool(task.round))

    async def _fetched(self, task: pb.NextTaskResponse, reference: pb.ArtifactRef) -> Path:
        with self._work_shown(task, "fetching the adapter") as show:
            fetched = self._workbench.fetch(self._link, self._session, reference, show)
            return await self._transferring(task.task_id, fetched)

    async def _beating(self, task: pb.NextTaskResponse, doing: str, compute: Callable[[Control], Result]) -> Result:
        with self._work_shown(task, doing) as show:
            return await self._computed(task.task_id, compute, show)

    async def _computed(
        self, task_id: str, compute: Callable[[Control], Result], show: Callable[[float], None] = lambda share: None
    ) -> Result:
        """Computes in the worker thread and meanwhile gives signs of life."""
        control = self._control = Control(show=show)
        known = contextvars.copy_context()
        future = asyncio.get_running_loop().run_in_executor(self._worker, known.run, compute, control)
        try:
            return await self._awaited(task_id, future, control)
        finally:
            self._control = None
            control.cancel()
            # Whoever waited may be gone: what the computation then says of its end is nobody's.
            future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _transferring(self, task_id: str, transfer: Coroutine[Any, Any, Result]) -> Result:
        """Waits for a transfer and meanwhile gives signs of life: a slow link, or a turn to wait for, is no silence."""
        future = asyncio.ensure_future(transfer)
        try:
            return await self._awaited(task_id, future, Control())
        finally:
            future.cancel()

    async def _awaited(self, task_id: str, future: asyncio.Future[Result], control: Control) -> Result:
        while True:
            done, _ = await asyncio.wait([future], timeout=self._lease_s / 3)
            if done:
                return future.result()
            beat = pb.HeartbeatRequest(session=self._session, task_id=task_id, progress=control.progress)
            answer = await self._link.call(self._link.federation.Heartbeat, beat)
            if answer.withdrawn:
                control.cancel()
