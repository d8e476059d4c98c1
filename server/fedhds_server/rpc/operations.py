"""The RPC methods that people call: look at the run, and change it with a reason."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc

from fedhds.errors import NotPermitted, RunOver, SettingsError, TaskError
from fedhds.fingerprint import is_digest
from fedhds.grpc_errors import answers
from fedhds.security.identity import Role, identity_of
from fedhds.settings import is_loopback
from fedhds.v2 import status_pb2
from fedhds.v2 import status_pb2_grpc as status_rpc
from fedhds_server.coordinator import Coordinator
from fedhds_server.coordinator.admission import Admission
from fedhds_server.rpc.peers import host_of
from fedhds_server.run import rollback
from fedhds_server.run.base_model import check_confirmation
from fedhds_server.run.events import ModelConfirmed, RunPaused, RunResumed, RunRolledBack, RunStopped, SiteEvicted
from fedhds_server.run.parties import party_of
from fedhds_server.run.state import RunState
from fedhds_server.status import site_status_of, status_of

_MAX_REASON = 500


class OperationsServicer(status_rpc.OperationsServicer):
    """What operators call."""

    def __init__(self, leading: Callable[[], Coordinator]) -> None:
        self._leading = leading

    @property
    def _coordinator(self) -> Coordinator:
        return self._leading()

    @answers
    async def GetStatus(
        self, request: status_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        try:
            _operator(context, self._coordinator.admission)
        except NotPermitted:
            peer = identity_of(context.auth_context())
            return site_status_of(self._coordinator.state, peer.name if peer and peer.role is Role.SITE else "")
        self._coordinator.timers.watched()
        return status_of(
            self._coordinator.state,
            self._coordinator.checkpoint,
            [line for line in self._coordinator.journal if line[0] > request.journal_after],
            deadline_s=self._coordinator.timers.deadline_s,
            warnings=self._coordinator.warnings,
        )

    @answers
    async def Pause(
        self, request: status_pb2.PauseRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.PauseResponse:
        who = _operator(context, self._coordinator.admission)

        def decide(state: RunState) -> RunPaused:
            _not_over(state)
            return RunPaused(_reasoned(request.reason, who))

        await self._coordinator.post(decide)
        return status_pb2.PauseResponse()

    @answers
    async def Resume(
        self, request: status_pb2.ResumeRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.ResumeResponse:
        who = _operator(context, self._coordinator.admission)

        def decide(state: RunState) -> RunResumed:
            _not_over(state)
            reason = _reasoned(request.reason, who) if request.reason else f"resumed by {who}" * bool(who)
            return RunResumed(reason)

        await self._coordinator.post(decide)
        return status_pb2.ResumeResponse()

    @answers
    async def Stop(self, request: status_pb2.StopRequest, context: grpc.aio.ServicerContext) -> status_pb2.StopResponse:
        who = _operator(context, self._coordinator.admission)

        def decide(state: RunState) -> RunStopped:
            _not_over(state)
            return RunStopped(time.time(), _reasoned(request.reason, who))

        await self._coordinator.post(decide)
        return status_pb2.StopResponse()

    @answers
    async def Evict(
        self, request: status_pb2.EvictRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.EvictResponse:
        who = _operator(context, self._coordinator.admission)

        def decide(state: RunState) -> SiteEvicted:
            if not is_digest(request.site) and not state.sites_of(party_of(request.site)):
                raise TaskError(
                    f"no site {request.site[:128]!r} has ever enrolled; see fedhds status for the names, or give the "
                    "fingerprint of its key"
                )
            _not_over(state)
            return SiteEvicted(time.time(), request.site, _reasoned(request.reason, who))

        await self._coordinator.post(decide)
        return status_pb2.EvictResponse()

    @answers
    async def ConfirmModel(
        self, request: status_pb2.ConfirmModelRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.ConfirmModelResponse:
        who = _operator(context, self._coordinator.admission)

        def decide(state: RunState) -> ModelConfirmed:
            check_confirmation(state, request.fingerprint)
            return ModelConfirmed(time.time(), request.fingerprint, _reasoned(request.reason, who))

        await self._coordinator.post(decide)
        return status_pb2.ConfirmModelResponse()

    @answers
    async def Rollback(
        self, request: status_pb2.RollbackRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.RollbackResponse:
        who = _operator(context, self._coordinator.admission)
        wanted = request.round_number if request.HasField("round_number") else None
        answer = status_pb2.RollbackResponse()

        def decide(state: RunState) -> RunRolledBack:
            answer.round_number = rollback.target(state, wanted)
            return RunRolledBack(time.time(), answer.round_number, _reasoned(request.reason, who))

        await self._coordinator.post(decide)
        return answer


def _operator(context: grpc.aio.ServicerContext, admission: Admission) -> str:
    """Who calls, if that is somebody who may change the run; raises NotPermitted."""
    peer = identity_of(context.auth_context())
    if peer is not None:
        if peer.role is not Role.OPERATOR:
            raise NotPermitted(
                f"the certificate of {peer.name!r} is a {peer.role.value}'s; have one issued with --role operator"
            )
        admission.refresh()
        if admission.is_revoked(peer.name, peer.key_fingerprint, peer.serial):
            raise NotPermitted(f"the certificate of {peer.name!r} is revoked")
        return peer.name
    if not is_loopback(host_of(context)):
        raise NotPermitted("without TLS a run is changed from the coordinator's own host only; call from there")
    return ""


def _reasoned(reason: str, who: str) -> str:
    text = " ".join(reason.split())
    if not text or len(text) > _MAX_REASON:
        raise SettingsError("--reason", f"give 1 to {_MAX_REASON} characters; they are kept in the journal")
    return f"{text} ({who})" if who else text


def _not_over(state: RunState) -> None:
    if state.phase.over:
        raise RunOver(f"the run is over: {state.message}")
