"""The RPC methods that sites call: unpack, call, pack. Their contracts are in proto/fedhds/v2/federation.proto."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from fedhds.encoding import printable
from fedhds.errors import ArtifactError, EnrollmentRefused, FedhdsError, TaskError
from fedhds.grpc_errors import abort, answers
from fedhds.security.identity import identity_of
from fedhds.tensors.artifact import Artifact
from fedhds.transfer import chunks
from fedhds.transfer.background_step import BackgroundStep
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import transfer_pb2
from fedhds_server.coordinator import Coordinator
from fedhds_server.counters import DOWNLOADED_BYTES, REJECTED, count_failure
from fedhds_server.rpc.validation import check_result, named_upload, registration
from fedhds_server.run.events import (
    FinalDelivered,
    ResultReceived,
    ResultRejected,
    SiteConnected,
    SiteLeft,
    SiteRegistered,
    TaskFailed,
)
from fedhds_server.run.membership import admit, check_registration, negotiate, session_digest, session_secret
from fedhds_server.run.messages import for_site
from fedhds_server.run.state import RunState, Site, Task
from fedhds_server.status import model_card_of
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.workflows import TASK_KINDS

logger = logging.getLogger(__name__)

# Longest time for which a long poll is kept open; below the idle limits of common proxies (60 s).
_MAX_POLL_S = 30.0
# The coordinator of the run while this process leads; raises NotLeading while it does not.
Leading = Callable[[], Coordinator]
_SERVICE = pb.DESCRIPTOR.services_by_name["Federation"].full_name


class FederationServicer(rpc.FederationServicer):
    """What sites call."""

    def __init__(self, leading: Leading) -> None:
        self._leading = leading

    @property
    def _coordinator(self) -> Coordinator:
        return self._leading()

    @property
    def _artifacts(self) -> ArtifactStore:
        return self._leading().artifacts

    def register(self, server: grpc.aio.Server) -> None:
        """Adds all methods to a server."""
        streams = {
            "Upload": grpc.stream_unary_rpc_method_handler(
                self.Upload, chunks.read_upload, transfer_pb2.UploadResponse.SerializeToString
            ),
            "Download": grpc.unary_stream_rpc_method_handler(self.Download, transfer_pb2.DownloadRequest.FromString),
        }
        rpc.add_FederationServicer_to_server(self, server)
        # In place of the generated ones.
        server.add_registered_method_handlers(_SERVICE, streams)

    @answers
    async def Enroll(self, request: pb.EnrollRequest, context: grpc.aio.ServicerContext) -> pb.EnrollResponse:
        version = negotiate(list(request.protocol_versions))
        peer = identity_of(context.auth_context())
        session = session_secret(request.session)

        def decide(state: RunState) -> SiteConnected:
            key = admit(state, request.site, peer, request.previous_session, session)
            return SiteConnected(request.site, key, session_digest(session))

        try:
            await self._coordinator.post(decide)
        except EnrollmentRefused as error:
            # Not in the journal: without TLS anybody can ask.
            logger.warning("refused to enroll: %s", printable(str(error)))
            raise
        state = self._coordinator.state
        return pb.EnrollResponse(
            session=session,
            protocol_version=version,
            spec=state.spec.model_dump_json(),
            run_id=state.run_id,
            heartbeat_timeout_s=state.spec.rounds.heartbeat_timeout,
        )

    @answers
    async def Register(self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext) -> pb.RegisterResponse:
        site = await self._caller(request)
        fingerprint, manifest = registration(request, self._coordinator.state.spec)

        def decide(state: RunState) -> SiteRegistered:
            check_registration(state, fingerprint, manifest, request.rows, request.evaluates)
            return SiteRegistered(time.time(), site.name, request.rows, request.evaluates, fingerprint, manifest)

        try:
            await self._coordinator.post(decide)
        except EnrollmentRefused as error:
            reason = f"{type(error).__name__}: {error}"
            await self._coordinator.post(SiteLeft(time.time(), site.name, reason))
            raise
        return pb.RegisterResponse()

    @answers
    async def NextTask(self, request: pb.NextTaskRequest, context: grpc.aio.ServicerContext) -> pb.NextTaskResponse:
        site = await self._caller(request)
        wait_s = request.wait_s if math.isfinite(request.wait_s) else 0.0
        task = await self._coordinator.presence.next_task(site, min(max(wait_s, 0.0), _MAX_POLL_S))
        # Asked again: during a long poll another process of the site may have taken the session over.
        await self._coordinator.presence.site_of(request.session)
        if self._coordinator.state.phase.over:
            # The site will not ask again, and the end may not be saved yet.
            await self._coordinator.post(lambda _: None)
        state = self._coordinator.state
        if state.phase.over:
            return pb.NextTaskResponse(done=_done(state, site.name))
        # The task may have been closed or withdrawn since.
        if task is None or task.id not in state.tasks:
            paused = None if state.paused is None else f"the run is paused: {state.paused}"
            return pb.NextTaskResponse(wait=pb.Wait(reason=paused or for_site(state, site.name)))
        return pb.NextTaskResponse(task=_task(state, task))

    @answers
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext) -> pb.HeartbeatResponse:
        site = await self._caller(request)
        self._coordinator.timers.progress.heard(site.name, request.task_id, request.progress)
        withdrawn = bool(request.task_id) and request.task_id not in self._coordinator.state.tasks
        return pb.HeartbeatResponse(withdrawn=withdrawn)

    @answers
    async def CompleteTask(
        self, request: pb.CompleteTaskRequest, context: grpc.aio.ServicerContext
    ) -> pb.CompleteTaskResponse:
        site = await self._caller(request)
        task = self._open_task(site, request.task_id)
        if task is None:
            # What was accepted may not be saved yet.
            await self._coordinator.post(lambda _: None)
            return await self._closed(site, request)
        artifact, rejection = await check_result(self._coordinator, task, request.result)
        if rejection:
            kind, reason = rejection
            REJECTED.labels(kind).inc()
            reason = printable(reason)
            await self._coordinator.post(ResultRejected(time.time(), task.id, reason))
            if artifact is not None:
                await self._discard(site, artifact)
            return pb.CompleteTaskResponse(reason=reason, rejected=True)
        await self._coordinator.post(ResultReceived(time.time(), task.id, request.result, artifact))
        if self._accepted(site, task.id):
            return pb.CompleteTaskResponse(accepted=True)
        # The task was closed while its result was checked.
        return await self._closed(site, request)

    async def _closed(self, site: Site, request: pb.CompleteTaskRequest) -> pb.CompleteTaskResponse:
        """The answer about a closed task; an upload that its result names is deleted unless the run needs it."""
        if (late := named_upload(request.task_id, request.result)) is not None:
            await self._discard(site, late)
        if self._accepted(site, request.task_id):
            return pb.CompleteTaskResponse(accepted=True)
        rejected = self._coordinator.state.sites[site.name].last_rejected
        if rejected and rejected.task_id == request.task_id:
            return pb.CompleteTaskResponse(reason=rejected.reason, rejected=True)
        return pb.CompleteTaskResponse(reason="the task is closed; its result came too late to count")

    def _accepted(self, site: Site, task_id: str) -> bool:
        """Whether the task's result is the one that was accepted last from the site."""
        return bool(task_id) and self._coordinator.state.sites[site.name].last_accepted == task_id

    @answers
    async def FailTask(self, request: pb.FailTaskRequest, context: grpc.aio.ServicerContext) -> pb.FailTaskResponse:
        site = await self._caller(request)
        task = self._open_task(site, request.task_id)
        if task:
            count_failure(task.kind, request.kind)
            reason = printable(f"{request.kind}: {request.reason}")
            await self._coordinator.post(TaskFailed(time.time(), task.id, reason))
        return pb.FailTaskResponse()

    @answers
    async def GetUpload(
        self, request: transfer_pb2.GetUploadRequest, context: grpc.aio.ServicerContext
    ) -> transfer_pb2.GetUploadResponse:
        await self._caller(request)
        artifact = Artifact.from_proto(request.artifact)
        offset = await asyncio.to_thread(self._artifacts.received, artifact)
        return transfer_pb2.GetUploadResponse(offset=offset, chunk_size=self._chunk_size)

    @answers
    async def Upload(
        self, requests: AsyncIterator[chunks.Chunk | transfer_pb2.UploadRequest], context: grpc.aio.ServicerContext
    ) -> transfer_pb2.UploadResponse:
        first = await anext(aiter(requests), transfer_pb2.UploadRequest())
        if not isinstance(first, transfer_pb2.UploadRequest) or not first.HasField("header"):
            raise ArtifactError("an upload starts with its header")
        presence, session = self._coordinator.presence, first.header.session
        site = await self._caller(first.header)
        artifact, offset = Artifact.from_proto(first.header.artifact), first.header.offset
        presence.uploads(site.name, artifact)
        writing = BackgroundStep()
        try:
            async for message in requests:
                # Asked again: meanwhile another process of the site may have taken the session over.
                await presence.site_of(session)
                chunk = message.chunk
                # One chunk is written and hashed while the next one arrives.
                await writing.start(self._artifacts.append, artifact, offset, chunk)
                offset += len(chunk)
                presence.received(site.name, len(chunk))
        finally:
            # What ended the call is what to tell, a link that broke above all; not what became of the last chunk.
            with contextlib.suppress(FedhdsError):
                await writing.ended()
        await writing.ended()
        finishing = asyncio.ensure_future(asyncio.to_thread(self._artifacts.finish, artifact))
        # The link may break meanwhile: then nobody is left to hear what becomes of the upload.
        finishing.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        # An object store may take minutes for what a site has sent: that the site waits is no silence.
        timeout_s = self._coordinator.state.spec.rounds.heartbeat_timeout / 3
        while not (await asyncio.wait([finishing], timeout=timeout_s))[0]:
            await presence.site_of(session)
        await finishing
        return transfer_pb2.UploadResponse()

    async def Download(
        self, request: transfer_pb2.DownloadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        try:
            await self._caller(request)
            artifact = Artifact.from_proto(request.artifact)
            if artifact not in self._coordinator.state.adapters.values():
                raise ArtifactError("there is no such global adapter (any more); ask for the task again")
            size = min(self._chunk_size, max(request.chunk_size or chunks.MAX_CHUNK, chunks.MIN_CHUNK))
            pieces = self._artifacts.open_chunks(artifact, request.offset, size)
            messages = map(chunks.download_message, pieces)
            reading = BackgroundStep()
            await reading.start(next, messages, None)
            while (message := await reading.ended()) is not None:
                # One chunk is read while the last one is sent.
                await reading.start(next, messages, None)
                yield message
                DOWNLOADED_BYTES.inc(len(message))
        except FedhdsError as error:
            await abort(context, error)

    @answers
    async def ConfirmDelivery(
        self, request: pb.ConfirmDeliveryRequest, context: grpc.aio.ServicerContext
    ) -> pb.ConfirmDeliveryResponse:
        site = await self._caller(request)
        if not self._coordinator.state.phase.over:
            raise TaskError("the run is not over, there is no final adapter yet")
        await self._coordinator.post(FinalDelivered(site.name))
        return pb.ConfirmDeliveryResponse()

    @answers
    async def Leave(self, request: pb.LeaveRequest, context: grpc.aio.ServicerContext) -> pb.LeaveResponse:
        site = await self._caller(request)
        reason = printable(f"{request.kind}: {request.reason}") if request.kind else ""
        await self._coordinator.post(SiteLeft(time.time(), site.name, reason))
        return pb.LeaveResponse()

    @property
    def _chunk_size(self) -> int:
        """Sites that have a task transfer at about the same time; when the run is over, all of them do."""
        state = self._coordinator.state
        return chunks.chunk_size(len(state.sites if state.phase.over else state.tasks))

    async def _caller(self, request: Any) -> Site:
        presence = self._coordinator.presence
        site = await presence.site_of(request.session)
        presence.received(site.name, request.ByteSize())
        return site

    def _open_task(self, site: Site, task_id: str) -> Task | None:
        task = self._coordinator.state.tasks.get(task_id)
        if task is not None and task.site != site.name:
            raise TaskError(f"the task {task_id!r} is not this site's")
        return task

    async def _discard(self, site: Site, artifact: Artifact) -> None:
        """Deletes an upload of the site's own that does not count, unless the run needs the same bytes.

        To be called after a save, which shows that this process still leads: the state of one that does so no more
        does not know what its successor counts on.
        """
        coordinator = self._coordinator
        if not coordinator.state.needs(artifact) and coordinator.presence.uploaded(site.name, artifact):
            await asyncio.to_thread(self._artifacts.delete, artifact)


def _task(state: RunState, task: Task) -> pb.Task:
    kind = TASK_KINDS[task.kind]
    message = pb.Task(id=task.id, round_number=task.round_number, kind=task.kind)
    message.adapter.CopyFrom(kind.adapter(state, task).to_proto())
    request = kind.request(state, task)
    if isinstance(request, AnyMessage):
        message.request.CopyFrom(request)
    elif request is not None:
        message.request.Pack(request)
    return message


def _done(state: RunState, site: str) -> pb.Done:
    done = pb.Done(outcome=state.phase.value, message=for_site(state, site))
    if state.adapters:
        done.adapter.CopyFrom(state.adapter.to_proto())
        done.adapter_config = state.adapter_manifest.config
        done.model_card = model_card_of(state)
    return done
