"""The RPC methods that sites call: unpack, call, pack. Their contracts are in proto/fedhds/v2/federation.proto."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from fedhds.encoding import printable
from fedhds.errors import ArtifactError, EnrollmentRefused, FedhdsError, SessionLost, TaskError
from fedhds.grpc_errors import abort, answers
from fedhds.security.identity import identity_of
from fedhds.tensors.artifact import Artifact
from fedhds.transfer import chunks
from fedhds.transfer.background_step import BackgroundStep
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import transfer_pb2
from fedhds_server.coordinator import Coordinator
from fedhds_server.coordinator.uploads import owner_of
from fedhds_server.counters import DOWNLOADED_BYTES, REJECTED, count_failure
from fedhds_server.rpc.limits import Leading, refuse
from fedhds_server.rpc.peers import key_of, peer_of
from fedhds_server.rpc.rates import Rates
from fedhds_server.rpc.validation import check_result, named_upload, registration, sent_first_values
from fedhds_server.run.events import (
    FinalDelivered,
    ResultReceived,
    ResultRejected,
    SiteConnected,
    SiteLeft,
    SiteRegistered,
    SiteRevoked,
    TaskFailed,
)
from fedhds_server.run.membership import admit, check_registration, negotiate, session_digest, session_secret
from fedhds_server.run.messages import for_site
from fedhds_server.run.state import RunState, Site, SiteState, Task, result_digest
from fedhds_server.status import model_card_of
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.workflows import TASK_KINDS

logger = logging.getLogger(__name__)

# Longest time for which a long poll is kept open; below the idle limits of common proxies (60 s).
_MAX_POLL_S = 30.0
# Of one site at the same time: those whose connections broke are noticed after some seconds.
_MAX_DOWNLOADS = 4
# Enrollments and registrations of one site: at once, and per second after that; a site that a supervisor starts again
# and again makes two each time.
_ARRIVALS, _ARRIVALS_PER_S = 200, 0.2
_SERVICE = pb.DESCRIPTOR.services_by_name["Federation"].full_name


class FederationServicer(rpc.FederationServicer):
    """What sites call."""

    def __init__(self, leading: Leading) -> None:
        self._leading = leading
        self._arrivals = Rates(_ARRIVALS, _ARRIVALS_PER_S)
        self._downloads: Counter[str] = Counter()

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
        await self._arrives(request.site, context)
        version = negotiate(list(request.protocol_versions))
        peer = identity_of(context.auth_context())
        session = session_secret(request.session)
        admission, serial = self._coordinator.admission, peer.serial if peer else ""
        admission.refresh()

        def decide(state: RunState) -> SiteConnected:
            key = admit(state, request.site, peer, request.previous_session, session, limits=admission.limits)
            if reason := admission.refusal(request.site, key, serial):
                raise EnrollmentRefused(reason)
            return SiteConnected(request.site, key, session_digest(session), serial)

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
        site = await self._caller(request, context)
        await self._arrives(site.name, context)
        fingerprint, manifest = await asyncio.to_thread(registration, request, self._coordinator.state.spec)
        first_values = await sent_first_values(self._coordinator, request, manifest)
        admission = self._coordinator.admission

        def decide(state: RunState) -> SiteRegistered:
            if state.sites[site.name].state is SiteState.LEFT:
                raise SessionLost("this site has left the run; enroll again")
            rows, held_out, validation_rows = request.rows, request.evaluation_rows, request.validation_rows
            check_registration(
                state,
                fingerprint,
                manifest,
                rows,
                request.evaluates,
                site=site.name,
                evaluation_rows=held_out,
                validation_rows=validation_rows,
                limits=admission.limits,
            )
            if (request.evaluates or validation_rows) and not admission.may_evaluate(site.name, site.key, site.serial):
                raise EnrollmentRefused(
                    f"{site.party!r} is not on the list of sites that may evaluate; leave --eval-data, "
                    "--validation-data and --holdout out, or ask the operator of the coordinator"
                )
            evaluates = request.evaluates
            return SiteRegistered(
                time.time(), site.name, rows, evaluates, fingerprint, manifest, held_out, validation_rows, first_values
            )

        try:
            await self._coordinator.post(decide)
        except EnrollmentRefused as error:
            reason = f"{type(error).__name__}: {error}"
            await self._coordinator.post(SiteLeft(time.time(), site.name, reason))
            raise
        return pb.RegisterResponse(first_values_needed=self._coordinator.state.needs_first_values)

    @answers
    async def NextTask(self, request: pb.NextTaskRequest, context: grpc.aio.ServicerContext) -> pb.NextTaskResponse:
        site = await self._caller(request, context)
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
        site = await self._caller(request, context)
        self._coordinator.timers.progress.heard(site.name, request.task_id, request.progress)
        withdrawn = bool(request.task_id) and request.task_id not in self._coordinator.state.tasks
        return pb.HeartbeatResponse(withdrawn=withdrawn)

    @answers
    async def CompleteTask(
        self, request: pb.CompleteTaskRequest, context: grpc.aio.ServicerContext
    ) -> pb.CompleteTaskResponse:
        site = await self._caller(request, context)
        async with self._coordinator.presence.turn(site.name):
            return await self._completed(site, request)

    async def _completed(self, site: Site, request: pb.CompleteTaskRequest) -> pb.CompleteTaskResponse:
        task = self._open_task(site, request.task_id)
        if task is None:
            # What was accepted may not be saved yet.
            await self._coordinator.post(lambda _: None)
            return self._closed(site, request)
        artifact, rejection = await check_result(self._coordinator, task, request.result)
        if rejection:
            kind, reason = rejection
            REJECTED.labels(kind).inc()
            reason = printable(reason)
            await self._coordinator.post(ResultRejected(time.time(), task.id, reason))
            return pb.CompleteTaskResponse(reason=reason, rejected=True)
        await self._coordinator.post(ResultReceived(time.time(), task.id, request.result, artifact))
        # The task may have been closed while its result was checked.
        return self._closed(site, request)

    def _closed(self, site: Site, request: pb.CompleteTaskRequest) -> pb.CompleteTaskResponse:
        """The answer about a closed task."""
        known = self._coordinator.state.sites[site.name]
        if request.task_id and known.last_accepted == request.task_id:
            # Saved by an earlier version, it has no digest.
            if known.last_result in ("", result_digest(request.result, named_upload(request.task_id, request.result))):
                return pb.CompleteTaskResponse(accepted=True)
            return pb.CompleteTaskResponse(reason="another result of this task was accepted; this one does not count")
        rejected = self._coordinator.state.sites[site.name].last_rejected
        if rejected and rejected.task_id == request.task_id:
            return pb.CompleteTaskResponse(reason=rejected.reason, rejected=True)
        return pb.CompleteTaskResponse(reason="the task is closed; its result came too late to count")

    @answers
    async def FailTask(self, request: pb.FailTaskRequest, context: grpc.aio.ServicerContext) -> pb.FailTaskResponse:
        site = await self._caller(request, context)
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
        site = await self._caller(request, context)
        artifact = Artifact.from_proto(request.artifact)
        async with self._coordinator.presence.turn(site.name):
            self._coordinator.uploads.check(site.name, artifact)
            offset = await asyncio.to_thread(self._artifacts.received, artifact, owner_of(site.name))
        return transfer_pb2.GetUploadResponse(offset=offset, chunk_size=self._chunk_size)

    @answers
    async def Upload(
        self, requests: AsyncIterator[chunks.Chunk | transfer_pb2.UploadRequest], context: grpc.aio.ServicerContext
    ) -> transfer_pb2.UploadResponse:
        first = await anext(aiter(requests), transfer_pb2.UploadRequest())
        if not isinstance(first, transfer_pb2.UploadRequest) or not first.HasField("header"):
            raise ArtifactError("an upload starts with its header")
        presence, session = self._coordinator.presence, first.header.session
        site = await self._caller(first.header, context)
        artifact, offset = Artifact.from_proto(first.header.artifact), first.header.offset
        upload, owner = await self._coordinator.uploads.begin(site.name, artifact, offset), owner_of(site.name)
        writing = BackgroundStep()
        try:
            async for message in requests:
                # Asked again: meanwhile another process of the site may have taken the session over.
                await presence.site_of(session)
                if not upload.open:
                    break
                chunk = message.chunk
                # One chunk is written and hashed while the next one arrives.
                await writing.start(self._artifacts.append, artifact, offset, chunk, owner)
                offset += len(chunk)
                upload.remaining -= len(chunk)
                presence.received(site.name, len(chunk))
        finally:
            # What ended the call is what to tell, a link that broke above all; not what became of the last chunk.
            with contextlib.suppress(FedhdsError):
                await writing.ended()
            if not (upload.open or self._coordinator.uploads.needs(artifact, owner)):
                # The chunk may have come after all else was deleted.
                await asyncio.to_thread(self._artifacts.delete_part, artifact, owner)
        await writing.ended()
        if not upload.open:
            raise TaskError("the task of this upload is closed, or the site has begun another upload")
        finishing = asyncio.ensure_future(asyncio.to_thread(self._artifacts.finish, artifact, owner))
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
            site = await self._caller(request, context)
        except FedhdsError as error:
            await abort(context, error)
            return
        if self._downloads[site.name] >= _MAX_DOWNLOADS:
            await refuse(context, f"the site has {_MAX_DOWNLOADS} downloads already")
        self._downloads[site.name] += 1
        try:
            artifact = Artifact.from_proto(request.artifact)
            if artifact not in self._coordinator.state.downloads:
                raise ArtifactError("there is no such global adapter or request (any more); ask for the task again")
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
        finally:
            self._downloads[site.name] -= 1

    @answers
    async def ConfirmDelivery(
        self, request: pb.ConfirmDeliveryRequest, context: grpc.aio.ServicerContext
    ) -> pb.ConfirmDeliveryResponse:
        site = await self._caller(request, context)
        if not self._coordinator.state.phase.over:
            raise TaskError("the run is not over, there is no final adapter yet")
        await self._coordinator.post(FinalDelivered(site.name))
        return pb.ConfirmDeliveryResponse()

    @answers
    async def Leave(self, request: pb.LeaveRequest, context: grpc.aio.ServicerContext) -> pb.LeaveResponse:
        site = await self._caller(request, context)
        reason = printable(f"{request.kind}: {request.reason}") if request.kind else ""
        await self._coordinator.post(SiteLeft(time.time(), site.name, reason))
        return pb.LeaveResponse()

    @property
    def _chunk_size(self) -> int:
        """Sites that have a task transfer at about the same time; when the run is over, all of them do."""
        state = self._coordinator.state
        return chunks.chunk_size(len(state.sites if state.phase.over else state.tasks))

    async def _caller(self, request: Any, context: grpc.aio.ServicerContext) -> Site:
        coordinator, presence = self._coordinator, self._coordinator.presence
        site = await presence.site_of(request.session, key_of(context))
        coordinator.admission.refresh()
        if reason := coordinator.admission.refusal(site.name, site.key, site.serial):
            await coordinator.post(SiteRevoked(time.time(), site.name, reason))
            raise EnrollmentRefused(reason)
        presence.received(site.name, request.ByteSize())
        return site

    async def _arrives(self, site: str, context: grpc.aio.ServicerContext) -> None:
        """Refuses a site that enrolls and registers all the time: each time is a line of the journal."""
        if not self._arrivals.take(f"{peer_of(context)}/{site[:128]}"):
            await refuse(context, f"the site {printable(site)!r} enrolls and registers too often")

    def _open_task(self, site: Site, task_id: str) -> Task | None:
        task = self._coordinator.state.tasks.get(task_id)
        if task is not None and task.site != site.name:
            raise TaskError(f"the task {task_id!r} is not this site's")
        return task


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
        number = state.delivered_round
        done.adapter.CopyFrom(state.adapters[number].to_proto())
        done.adapter_config = state.adapter_manifest.config
        done.model_card = model_card_of(state, number)
    return done
