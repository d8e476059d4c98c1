"""One site's life: enroll, register, then task after task until the run is over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedhds import PROTOCOL_VERSIONS, __version__
from fedhds.encoding import printable
from fedhds.errors import (
    ArtifactError,
    CoordinatorUnreachable,
    EnrollmentRefused,
    Evicted,
    FedhdsError,
    SessionLost,
    StorageError,
    TaskError,
)
from fedhds.long_messages import MAX_INLINE, artifact_of, standing_for
from fedhds.runtime.logging import about
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import transfer_pb2
from fedhds_client import incoming
from fedhds_client.computation import Cancelled, ComputeThread, Control
from fedhds_client.counters import ENDED, ENROLLING, TASK_FAILURES, TASK_SECONDS, WAITING
from fedhds_client.executor import TaskExecutor
from fedhds_client.long_messages import LongResult, fetch_request, keep_result
from fedhds_client.outgoing import public_reason
from fedhds_client.progress import ProgressDisplay
from fedhds_client.registration import register
from fedhds_client.rpc_client import CoordinatorClient
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site
from fedhds_client.state_files import file_key
from fedhds_client.tasks import TASKS, task_kind

if TYPE_CHECKING:
    from fedhds_client.tasks.secure_train import MaskedFile
    from fedhds_client.updates.update import FinishedUpdate

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_POLL_S = 25.0
_MIN_POLL_S = 0.2
# A process that ends tells the coordinator, but does not wait for one that is gone.
_LEAVE_S = 2.0
_STORAGE_RETRY_S = 5.0
# Shares of a task, for the coordinator: fetching the adapter, computing, and what is left for sending.
_FETCHED, _COMPUTED = 0.1, 0.8
_ENDS = (SessionLost, CoordinatorUnreachable, EnrollmentRefused)


class SiteLoop:
    """Talks to the coordinator for one site; its computations run in the process's worker thread."""

    def __init__(
        self,
        site: Site,
        client: CoordinatorClient,
        executor: TaskExecutor,
        worker: ComputeThread,
        settings: ClientSettings,
        display: ProgressDisplay,
    ) -> None:
        self._site = site
        self._client = client
        self._executor = executor
        self._worker = worker
        self._settings = settings
        self._display = display
        self._session = ""
        self._heartbeat_timeout_s = 60.0
        self._run_id = ""
        self._noised = False
        self._round_number = 0
        self._control: Control | None = None
        self._blocked_since = 0.0
        # By kind of task. What came too late counts as neither.
        self._results: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._last_failure = ""
        self._finished = False
        self.failure: tuple[str, str] | None = None
        """What ended the site: the class of the error, and a line of ours that may leave the site."""
        self.activity = ENROLLING
        """What the site does now: a kind of task, or one of the words of `fedhds_client.counters`."""

    @property
    def progress(self) -> float:
        """The share of the current computation that is done, 0 to 1."""
        return self._control.progress if self._control else 0.0

    async def run(self) -> bool:
        """Whether the run ended as it should; raises FedhdsError when the site cannot go on."""
        about(lambda: {"run": self._run_id, "site": self._site.name, "round": self._round_number})
        try:
            return await self._live()
        except Evicted as error:
            # The other sites of this process go on.
            logger.error("%s: %s", self._site.name, error)
            return False
        except Exception as error:
            self.failure = type(error).__name__, public_reason(error, noised=self._noised)
            raise
        finally:
            self.activity = ENDED

    async def _live(self) -> bool:
        await self._enroll()
        self.activity = WAITING
        reason = ""
        # A poll that lasts longer than the heartbeat time-out would look like silence.
        wait_s = min(_POLL_S, self._heartbeat_timeout_s / 3)
        while True:
            request, asked_at = pb.NextTaskRequest(session=self._session, wait_s=wait_s), time.monotonic()
            answer = await self._client.call(self._client.federation.NextTask, request, wait_s=wait_s)
            match answer.WhichOneof("next"):
                case "wait":
                    if printable(answer.wait.reason) != reason:
                        reason = printable(answer.wait.reason)
                        logger.info("%s: %s", self._site.name, reason or "waiting")
                    # A coordinator that does not hold the call must not keep this process busy.
                    await asyncio.sleep(max(0.0, asked_at + _MIN_POLL_S - time.monotonic()))
                case "done":
                    return await self._finish(answer.done)
                case "task":
                    reason, task = "", incoming.task(answer.task)
                    # Kinds that this version does not know share one label; they fail in `_result`.
                    self.activity, self._round_number = task.kind if task.kind in TASKS else WAITING, task.round_number
                    with TASK_SECONDS.labels(self.activity).time():
                        await self._work(task)
                    self.activity = WAITING
                case other:
                    raise FedhdsError(
                        f"the coordinator sent an answer that fedhds {__version__} does not know ({other}); install "
                        "the coordinator's version here"
                    )

    def abandon(self) -> None:
        """Asks a running computation to stop."""
        if self._control:
            self._control.cancel()

    async def leave(self, failure: tuple[str, str] | None) -> None:
        """Tells the coordinator that the site stops, and what failed, if it can be reached at once."""
        if not self._session:
            return
        kind, reason = failure if failure and not self._finished else ("", "")
        request = pb.LeaveRequest(session=self._session, kind=kind, reason=reason)
        self._session = ""
        try:
            await self._client.federation.Leave(request, timeout=_LEAVE_S)
        except Exception as error:  # noqa: BLE001 - nothing depends on it: the session ends by itself
            logger.debug("the coordinator did not hear that the site leaves: %s", type(error).__name__)

    async def _enroll(self) -> None:
        request = pb.EnrollRequest(
            site=self._site.name,
            protocol_versions=PROTOCOL_VERSIONS,
            fedhds_version=__version__,
            previous_session=self._site.session(),
            session=self._site.next_session(),
        )
        answer = await self._client.call(self._client.federation.Enroll, request)
        enrollment = incoming.enrollment(answer)
        self._session, self._run_id, spec = enrollment.session, enrollment.run_id, enrollment.spec
        self._heartbeat_timeout_s = enrollment.heartbeat_timeout_s
        self._noised = spec.privacy.noised
        self._site.keep_session()
        logger.info(
            "%s: enrolled in run %s (%s, %d rounds of %s)",
            self._site.name,
            self._run_id,
            spec.model.name,
            spec.rounds.count,
            spec.selection.strategy.name,
        )
        fingerprint, manifest = await self._computed("", lambda _: self._executor.prepare(spec))
        with self._shown("checking the rows", 0) as show:
            rows = await self._computed(
                "", lambda control: self._executor.judge(self._site, self._run_id, control), show
            )
        registration = pb.RegisterRequest(
            session=self._session, fingerprint=fingerprint, manifest=manifest.to_proto(), rows=rows
        )
        await register(
            self._client, self._executor, self._site, registration, self._site.folder / file_key(self._run_id)
        )

    async def _work(self, task: pb.Task) -> None:
        name, kind, number = self._site.name, task.kind, task.round_number
        try:
            answer = await self._result(task)
        except _ENDS:
            raise
        except Cancelled:
            logger.info("%s: %s task of round %d is no longer needed", name, kind, number)
        except StorageError as error:
            # People free disks in minutes; a task that failed at once would cost the site its rounds meanwhile.
            now = asyncio.get_running_loop().time()
            self._blocked_since = self._blocked_since or now
            logger.error("%s: %s task of round %d: %s", name, kind, number, error)
            if now - self._blocked_since > self._settings.reconnect_timeout:
                await self._fail(task, error)
            else:
                logger.info("%s: trying again in %.0f s", name, _STORAGE_RETRY_S)
                await asyncio.sleep(min(_STORAGE_RETRY_S, self._heartbeat_timeout_s / 3))
        except FedhdsError as error:
            logger.error("%s: %s task of round %d failed: %s", name, kind, number, error)
            await self._fail(task, error)
        except Exception as error:
            # What a library throws must not end the site.
            logger.exception("%s: %s task of round %d failed", name, kind, number)
            await self._fail(task, error)
        else:
            self._blocked_since = 0.0
            if answer.accepted:
                self._results[kind] += 1
            elif answer.rejected:
                reason = printable(answer.reason)
                logger.error("%s: the coordinator rejected the result of round %d: %s", name, number, reason)
                self._count_failure(task, "ResultRejected", reason)
            else:
                logger.warning("%s: the coordinator did not take the result: %s", name, printable(answer.reason))

    async def _result(self, task: pb.Task) -> pb.CompleteTaskResponse:
        kind = task_kind(task.kind)
        adapter = await self._fetch(task.id, task.adapter, task.round_number)
        folder = self._site.folder / file_key(self._run_id)
        long = artifact_of(task.request) is not None
        if long:
            fetching = partial(fetch_request, self._client, self._session, task.request, folder)
            with self._shown("fetching the request", task.round_number) as show:
                task.request.CopyFrom(await self._transferred(task.id, fetching, show, 0.0, _FETCHED))
        with self._shown(kind.doing, task.round_number) as show:
            result = await self._computed(
                task.id,
                lambda control: self._executor.execute(self._site, self._run_id, task, adapter, control),
                show,
            )
        request = pb.CompleteTaskRequest(session=self._session, task_id=task.id)
        request.result.Pack(result.message)
        update: FinishedUpdate | MaskedFile | LongResult | None = result.update
        if update is None and (long or request.result.ByteSize() > MAX_INLINE):
            update = await asyncio.to_thread(keep_result, request.result, folder)
            request.result.CopyFrom(standing_for(update.artifact))
        if update is None:
            return await self._complete(request)
        doing = f"sending the {'update' if result.update else 'report'}"
        # A task that was closed meanwhile takes no upload: the answer says what became of it.
        with self._shown(doing, task.round_number) as show, suppress(TaskError):
            await self._transferred(
                task.id,
                lambda progress: self._client.upload(self._session, update.path, update.artifact, progress),
                show,
                _FETCHED + _COMPUTED,
                1 - _FETCHED - _COMPUTED,
            )
        try:
            answer = await self._complete(request)
        except ArtifactError as error:
            # A coordinator that took over, or found the bytes damaged, asks for what was uploaded once more.
            logger.warning("%s: %s", self._site.name, error)
            with suppress(TaskError):
                await self._client.upload(self._session, update.path, update.artifact)
            answer = await self._complete(request)
        update.path.unlink(missing_ok=True)
        return answer

    async def _complete(self, request: pb.CompleteTaskRequest) -> pb.CompleteTaskResponse:
        answer: pb.CompleteTaskResponse = await self._client.call(self._client.federation.CompleteTask, request)
        return answer

    async def _finish(self, done: pb.Done) -> bool:
        outcome, message = incoming.outcome(done)
        if done.HasField("adapter"):
            await self._deliver(done)
            logger.info("%s: the final adapter is in %s", self._site.name, self._settings.out)
        request = pb.ConfirmDeliveryRequest(session=self._session)
        await self._client.call(self._client.federation.ConfirmDelivery, request)
        failed = outcome == "failed"
        verb = "is stopped" if outcome == "stopped" else outcome
        level = logging.ERROR if failed else logging.INFO
        logger.log(level, "%s: the run %s: %s", self._site.name, verb, message)
        self._finished = True
        worked = bool(self._results)
        # A site that selects, but fails each time to train, gave nothing either. Kinds of later versions may fail.
        lost = [kind for kind in self._failures if not self._results[kind] and (kind in TASKS or not worked)]
        if lost:
            logger.error(
                "%s: every %s of this site failed (%d of them); the run ended without %s; the last failure: %s",
                self._site.name,
                f"{' and '.join(lost)} task" if worked else "task",
                sum(self._failures[kind] for kind in lost),
                "their results" if worked else "it",
                self._last_failure,
            )
            return False
        return not failed

    async def _deliver(self, done: pb.Done) -> None:
        """Writes the final adapter to --out; like a task, it waits for people who free a disk."""
        begin, card = time.monotonic(), incoming.model_card(done.model_card)
        while True:
            try:
                return await self._write(await self._fetch("", done.adapter, 0), card)
            except StorageError as error:
                if time.monotonic() - begin > self._settings.reconnect_timeout:
                    raise
                text = "%s: the final adapter is not written: %s; trying again in %.0f s"
                logger.error(text, self._site.name, error, _STORAGE_RETRY_S)
            await asyncio.sleep(min(_STORAGE_RETRY_S, self._heartbeat_timeout_s / 4))
            await self._client.call(self._client.federation.Heartbeat, pb.HeartbeatRequest(session=self._session))

    async def _write(self, adapter: Path, card: str) -> None:
        writing = asyncio.to_thread(self._executor.deliver, self._site, self._run_id, adapter, card)
        await self._transferred("", lambda _: writing, lambda _: None, 1.0, 0.0)

    async def _fail(self, task: pb.Task, error: Exception) -> None:
        name, reason = type(error).__name__, public_reason(error, noised=self._noised)
        self._count_failure(task, name, reason)
        request = pb.FailTaskRequest(session=self._session, task_id=task.id, kind=name, reason=reason)
        await self._client.call(self._client.federation.FailTask, request)

    def _count_failure(self, task: pb.Task, name: str, reason: str) -> None:
        self._failures[task.kind] += 1
        self._last_failure = f"{name}: {reason}"
        TASK_FAILURES.labels(self.activity, name).inc()

    def _shown(self, doing: str, round_number: int) -> AbstractContextManager[Callable[[float], None]]:
        return self._display.work(f"{self._site.name}: {doing}" + f", round {round_number}" * bool(round_number))

    async def _fetch(self, task_id: str, reference: transfer_pb2.ArtifactRef, round_number: int) -> Path:
        with self._shown("fetching the adapter", round_number) as show:
            return await self._transferred(
                task_id,
                lambda progress: self._executor.fetch(self._client, self._session, reference, progress),
                show,
                0.0,
                _FETCHED if task_id else 1.0,
            )

    async def _computed(
        self, task_id: str, compute: Callable[[Control], Result], show: Callable[[float], None] = lambda share: None
    ) -> Result:
        """Computes in the worker thread and sends heartbeats meanwhile."""
        control = self._control = Control(show=show)
        future = self._worker.start(compute, control)
        try:
            return await self._awaited(task_id, future, lambda: _FETCHED + _COMPUTED * control.advance, control)
        finally:
            self._control = None
            control.cancel()
            # The caller may be gone: how the computation then ends is not reported.
            future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _transferred(
        self,
        task_id: str,
        transfer: Callable[[Callable[[float], None]], Coroutine[Any, Any, Result]],
        show: Callable[[float], None],
        begin: float,
        length: float,
    ) -> Result:
        """Waits for a transfer and sends heartbeats meanwhile: a slow connection or a wait for a turn is no silence.

        The transfer is the share of the task from `begin` on.
        """
        control = Control(show=show)
        future = asyncio.ensure_future(transfer(control.report))
        try:
            return await self._awaited(task_id, future, lambda: begin + length * control.progress, control)
        finally:
            future.cancel()

    async def _awaited(
        self, task_id: str, future: asyncio.Future[Result], progress: Callable[[], float], control: Control
    ) -> Result:
        while True:
            done, _ = await asyncio.wait([future], timeout=self._heartbeat_timeout_s / 4)
            if done:
                return future.result()
            beat = pb.HeartbeatRequest(session=self._session, task_id=task_id, progress=progress())
            answer = await self._client.call(self._client.federation.Heartbeat, beat)
            if answer.withdrawn:
                control.cancel()
