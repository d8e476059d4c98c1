"""The RPC methods that sites call: unpack, call, pack."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from fedhds import chunks
from fedhds.errors import (
    AdapterError,
    ArtifactError,
    DamagedArtifact,
    EnrolmentRefused,
    FedhdsError,
    RequestError,
    TaskError,
)
from fedhds.security.identity import identity_of
from fedhds.status import abort, answers
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.transfer import Beside
from fedhds.v1 import federation_pb2 as pb
from fedhds.v1 import federation_pb2_grpc as rpc
from fedhds_server.aggregation.base import validate_update
from fedhds_server.artifacts import ArtifactStore
from fedhds_server.coordinator import Coordinator
from fedhds_server.counted import DOWNLOADED_BYTES, REJECTED, count_failure
from fedhds_server.enrolment import admit, check_attestation, drawn_session, negotiate, session_digest
from fedhds_server.events import (
    EvaluationReceived,
    FinalDelivered,
    NothingToGive,
    ReportReceived,
    ResultRejected,
    SiteAttested,
    SiteConnected,
    SiteLeft,
    TaskFailed,
    UpdateReceived,
)
from fedhds_server.report import run_card
from fedhds_server.selection import cells
from fedhds_server.state import Evaluation, Phase, RunState, Site, Task, TaskKind

logger = logging.getLogger(__name__)

# Longest time for which a long poll is held; below the idle limits of common proxies (60 s).
_LONGEST_POLL_S = 30.0
_DONE = "done"
# Nats per response token that no model gives; what is summed over sites and rounds stays finite below it.
_LARGEST_LOSS = 1e9
_MOST_MEASURED = 10**15
# The coordinator of the run while this process leads; raises NotLeading while it does not.
Leading = Callable[[], Coordinator]
_SERVICE = pb.DESCRIPTOR.services_by_name["Federation"].full_name


class FederationServicer(rpc.FederationServicer):
    """What sites call; every method's contract stands in proto/fedhds/v1/federation.proto."""

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
                self.Upload, chunks.read_upload, pb.UploadResponse.SerializeToString
            ),
            "Download": grpc.unary_stream_rpc_method_handler(self.Download, pb.DownloadRequest.FromString),
        }
        rpc.add_FederationServicer_to_server(self, server)
        # In place of the generated ones.
        server.add_registered_method_handlers(_SERVICE, streams)

    @answers
    async def Enroll(self, request: pb.EnrollRequest, context: grpc.aio.ServicerContext) -> pb.EnrollResponse:
        version = negotiate(list(request.protocol_versions))
        peer = identity_of(context.auth_context())
        session = drawn_session(request.session)

        def decide(state: RunState) -> SiteConnected:
            key = admit(state, request.site, peer, request.previous_session, session)
            return SiteConnected(request.site, key, session_digest(session))

        await self._coordinator.post(decide)
        state = self._coordinator.state
        return pb.EnrollResponse(
            session=session,
            protocol_version=version,
            run=state.spec.to_proto(),
            run_id=state.run_id,
            lease_s=state.spec.patience,
        )

    @answers
    async def Attest(self, request: pb.AttestRequest, context: grpc.aio.ServicerContext) -> pb.AttestResponse:
        site = await self._caller(request)
        fingerprint = {
            "weights": request.fingerprint.weights,
            "config": request.fingerprint.config,
            "tokenizer": request.fingerprint.tokenizer,
            "template": request.fingerprint.template,
            "feature_model": request.fingerprint.feature_model,
        }
        manifest = AdapterManifest.from_proto(request.manifest)

        def decide(state: RunState) -> SiteAttested:
            check_attestation(state, fingerprint, manifest, request.rows, request.evaluates)
            return SiteAttested(time.time(), site.name, request.rows, request.evaluates, fingerprint, manifest)

        try:
            await self._coordinator.post(decide)
        except EnrolmentRefused as error:
            await self._coordinator.post(SiteLeft(time.time(), site.name, str(error)))
            raise
        return pb.AttestResponse()

    @answers
    async def NextTask(self, request: pb.NextTaskRequest, context: grpc.aio.ServicerContext) -> pb.NextTaskResponse:
        site = await self._caller(request)
        wait_s = request.wait_s if math.isfinite(request.wait_s) else 0.0
        task = await self._coordinator.next_task(site, min(max(wait_s, 0.0), _LONGEST_POLL_S))
        # Asked again: during a long poll another process of the site may have taken the session over.
        await self._coordinator.site_of(request.session)
        state = self._coordinator.state
        if state.phase.over:
            return pb.NextTaskResponse(task_id=_DONE, round=state.round, done=_done_task(state))
        if task is None:
            paused = None if state.paused is None else f"the run is paused: {state.paused}"
            return pb.NextTaskResponse(round=state.round, wait=pb.WaitTask(reason=paused or state.message))
        return _task_message(state, task)

    @answers
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext) -> pb.HeartbeatResponse:
        await self._caller(request)
        return pb.HeartbeatResponse(
            withdrawn=bool(request.task_id)
            and request.task_id != _DONE
            and request.task_id not in self._coordinator.state.tasks
        )

    @answers
    async def CompleteTask(
        self, request: pb.CompleteTaskRequest, context: grpc.aio.ServicerContext
    ) -> pb.CompleteTaskResponse:
        site = await self._caller(request)
        result = request.WhichOneof("result")
        if result == "delivered":
            if not self._coordinator.state.phase.over:
                raise TaskError("the run is not over, there is no final adapter yet")
            await self._coordinator.post(FinalDelivered(site.name))
            return pb.CompleteTaskResponse(accepted=True)
        task = self._open_task(site, request.task_id)
        if task is None:
            if result == "train" and request.train.HasField("update"):
                await self._discard(Artifact.from_proto(request.train.update))
            if self._coordinator.state.counted(request.task_id, site.name):
                return pb.CompleteTaskResponse(accepted=True)
            return pb.CompleteTaskResponse(reason="the task is closed; its result came too late to count")
        now = time.time()
        match task.kind, result:
            case TaskKind.SELECT, "clusters" if self._coordinator.state.spec.strategy != "global":
                await self._coordinator.post(ReportReceived(now, task.id, request.clusters))
            case TaskKind.SELECT, "cells" if self._coordinator.state.spec.strategy == "global":
                return await self._take_cells(task, request.cells)
            case TaskKind.EVALUATE, "evaluation":
                await self._coordinator.post(EvaluationReceived(now, task.id, _evaluation(request.evaluation)))
            case TaskKind.TRAIN, "train":
                return await self._take_update(task, request.train)
            case _:
                raise RequestError(f"a {task.kind} task cannot be completed by a result of kind {result!r}")
        return pb.CompleteTaskResponse(accepted=True)

    async def _take_cells(self, task: Task, report: pb.CellReport) -> pb.CompleteTaskResponse:
        state = self._coordinator.state
        rows = state.sites[task.site].rows
        if fault := cells.check(report, state.spec, centres=state.centres_now, rows=rows):
            REJECTED.labels("cells").inc()
            reason = _printable(f"the report is rejected: {fault}")
            await self._coordinator.post(ResultRejected(time.time(), task.id, reason))
            return pb.CompleteTaskResponse(reason=reason)
        await self._coordinator.post(ReportReceived(time.time(), task.id, report))
        return pb.CompleteTaskResponse(accepted=True)

    async def _take_update(self, task: Task, result: pb.TrainResult) -> pb.CompleteTaskResponse:
        if not result.HasField("update") and not result.samples:
            await self._coordinator.post(NothingToGive(time.time(), task.id))
            return pb.CompleteTaskResponse(accepted=True)
        artifact = Artifact.from_proto(result.update)
        if not await asyncio.to_thread(self._artifacts.has, artifact):
            raise ArtifactError("the update is not here; upload it before completing its task")
        try:
            path = await asyncio.to_thread(self._artifacts.verified, artifact)
        except DamagedArtifact as error:
            logger.error("%s", error)
            await self._discard(artifact)
            raise ArtifactError("the update was damaged where it was kept; upload it again") from error
        reason = kind = ""
        if not abs(result.loss) <= _LARGEST_LOSS:
            kind, reason = "loss", f"the training loss is {result.loss:g}, which no model gives"
        state = self._coordinator.state
        most = state.most_samples(task.site)
        if not 0 < result.samples <= most:
            kind = "samples"
            reason = f"the update claims {result.samples} samples, the site was to train on {most} rows at most"
        current = await asyncio.to_thread(self._artifacts.verified, state.adapters[max(state.adapters)])
        try:
            await asyncio.to_thread(
                validate_update,
                path,
                state.adapter_manifest,
                current=current,
                largest_norm=state.spec.max_update_norm,
            )
        except AdapterError as error:
            kind, reason = "adapter", _printable(f"the update is rejected: {error}")
        if reason:
            REJECTED.labels(kind).inc()
            await self._coordinator.post(ResultRejected(time.time(), task.id, reason))
            await self._discard(artifact)
            return pb.CompleteTaskResponse(reason=reason)
        await self._coordinator.post(UpdateReceived(time.time(), task.id, artifact, result.samples, result.loss))
        return pb.CompleteTaskResponse(accepted=True)

    @answers
    async def FailTask(self, request: pb.FailTaskRequest, context: grpc.aio.ServicerContext) -> pb.FailTaskResponse:
        site = await self._caller(request)
        task = self._open_task(site, request.task_id)
        if task:
            count_failure(task.kind, request.kind)
            reason = _printable(f"{request.kind}: {request.reason}")
            await self._coordinator.post(TaskFailed(time.time(), task.id, reason))
        return pb.FailTaskResponse()

    @answers
    async def GetUpload(self, request: pb.GetUploadRequest, context: grpc.aio.ServicerContext) -> pb.GetUploadResponse:
        await self._caller(request)
        artifact = Artifact.from_proto(request.artifact)
        offset = await asyncio.to_thread(self._artifacts.received, artifact)
        return pb.GetUploadResponse(offset=offset, chunk_size=self._chunk_size)

    @answers
    async def Upload(
        self, requests: AsyncIterator[chunks.Chunk | pb.UploadRequest], context: grpc.aio.ServicerContext
    ) -> pb.UploadResponse:
        first = await anext(aiter(requests), pb.UploadRequest())
        if not isinstance(first, pb.UploadRequest) or not first.HasField("header"):
            raise ArtifactError("an upload starts with its header")
        site = await self._caller(first.header)
        artifact, offset = Artifact.from_proto(first.header.artifact), first.header.offset
        writing = Beside()
        try:
            async for message in requests:
                # Asked again: meanwhile another process of the site may have taken the session over.
                await self._coordinator.site_of(first.header.session)
                chunk = message.chunk
                # One chunk is written and hashed while the next one arrives.
                await writing.start(self._artifacts.append, artifact, offset, chunk)
                offset += len(chunk)
                site.bytes_received += len(chunk)
        finally:
            # What ended the call is what to tell, a link that broke above all; not what became of the last chunk.
            with contextlib.suppress(FedhdsError):
                await writing.ended()
        await writing.ended()
        finishing = asyncio.ensure_future(asyncio.to_thread(self._artifacts.finish, artifact))
        # The link may break meanwhile: what then becomes of the upload is for nobody to hear.
        finishing.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        # An object store may take minutes for what a site has sent: that the site waits is no silence.
        while not (await asyncio.wait([finishing], timeout=self._coordinator.state.spec.patience / 3))[0]:
            await self._coordinator.site_of(first.header.session)
        await finishing
        return pb.UploadResponse()

    async def Download(self, request: pb.DownloadRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        try:
            await self._caller(request)
            artifact = Artifact.from_proto(request.artifact)
            if artifact not in self._coordinator.state.adapters.values():
                raise ArtifactError("there is no such global adapter (any more); ask for the task again")
            size = min(self._chunk_size, max(request.chunk_size or chunks.LARGEST_CHUNK, chunks.SMALLEST_CHUNK))
            pieces = self._artifacts.open_chunks(artifact, request.offset, size)
            messages = map(chunks.download_message, pieces)
            reading = Beside()
            await reading.start(next, messages, None)
            while (message := await reading.ended()) is not None:
                # One chunk is read while the last one is sent.
                await reading.start(next, messages, None)
                yield message
                DOWNLOADED_BYTES.inc(len(message))
        except FedhdsError as error:
            await abort(context, error)

    @answers
    async def Leave(self, request: pb.LeaveRequest, context: grpc.aio.ServicerContext) -> pb.LeaveResponse:
        site = await self._caller(request)
        await self._coordinator.post(SiteLeft(time.time(), site.name))
        return pb.LeaveResponse()

    @property
    def _chunk_size(self) -> int:
        """Sites that have a task transfer at about the same time; when the run is over, all of them do."""
        state = self._coordinator.state
        return chunks.chunk_size(len(state.sites if state.phase.over else state.tasks))

    async def _caller(self, request: Any) -> Site:
        site = await self._coordinator.site_of(request.session)
        site.bytes_received += request.ByteSize()
        return site

    def _open_task(self, site: Site, task_id: str) -> Task | None:
        task = self._coordinator.state.tasks.get(task_id)
        if task is not None and task.site != site.name:
            raise TaskError(f"the task {task_id!r} is not this site's")
        return task

    async def _discard(self, artifact: Artifact) -> None:
        """Deletes an upload that does not count, unless something else names the same bytes."""
        # Shown by a save that it still leads: a deposed leader's state does not know what its successor counts on.
        await self._coordinator.post(lambda _: None)
        state = self._coordinator.state
        named = {*state.adapters.values(), *(update.artifact for update in state.updates.values())}
        if artifact not in named:
            await asyncio.to_thread(self._artifacts.delete, artifact)


def _printable(text: str) -> str:
    """A peer's words as one short line that harms neither a log, nor a terminal, nor a database."""
    return "".join(character if character.isprintable() else " " for character in text[:500])


def _evaluation(result: pb.EvaluationResult) -> Evaluation:
    if not all(0 < count <= _MOST_MEASURED for count in (result.rows, result.tokens)):
        raise RequestError(f"an evaluation needs rows and tokens, at most {_MOST_MEASURED} of each")
    if not abs(result.loss_sum) <= _LARGEST_LOSS * result.tokens:
        raise RequestError(f"the sum of losses is {result.loss_sum:g}, which no model gives")
    if not 0 <= result.rouge_l_sum <= result.rows:
        raise RequestError("the sum of Rouge-L F1 lies outside 0 to the number of rows")
    return Evaluation(rows=result.rows, tokens=result.tokens, loss_sum=result.loss_sum, rouge_l_sum=result.rouge_l_sum)


def _task_message(state: RunState, task: Task) -> pb.NextTaskResponse:
    message = pb.NextTaskResponse(task_id=task.id, round=task.round)
    newest = state.adapters[max(state.adapters)]
    match task.kind:
        case TaskKind.SELECT:
            message.select.adapter.CopyFrom(newest.to_proto())
            if centres := state.centres_now:
                message.select.centres.CopyFrom(centres)
        case TaskKind.TRAIN:
            message.train.adapter.CopyFrom(newest.to_proto())
            message.train.coreset.CopyFrom(state.coreset_of(task.site))
        case TaskKind.EVALUATE:
            message.evaluate.adapter.CopyFrom(state.adapters[task.round].to_proto())
    return message


def _done_task(state: RunState) -> pb.DoneTask:
    outcome = state.phase.value if state.phase.over else Phase.FAILED.value
    done = pb.DoneTask(outcome=outcome, message=state.message)
    if state.adapters:
        done.adapter.CopyFrom(state.adapters[max(state.adapters)].to_proto())
        done.adapter_config = state.adapter_manifest.config
        done.model_card = run_card(state)
    return done
