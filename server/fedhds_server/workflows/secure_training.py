"""Training under secure aggregation: five steps of one round, after which the coordinator has the sum of the updates.

Bonawitz et al. 2017, fig. 4, on a full graph; docs/secure-aggregation.md says what each step is for.
"""

from __future__ import annotations

import base64
import hashlib
from enum import IntEnum
from typing import TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from fedhds.errors import DamagedArtifact, PeerNotVerified, RequestError
from fedhds.long_messages import artifact_of, long_message, standing_for
from fedhds.secure.keys import RoundId
from fedhds.secure.quantization import HEADER_VALUES, MAX_SITES
from fedhds.secure.sealing import SEALED_BYTES
from fedhds.secure.shamir import SHARE_BYTES
from fedhds.secure.signatures import check_signature, public_key_of_certificate
from fedhds.secure.terms import (
    Terms,
    check_shape,
    integer_weights,
    keys_statement,
    lists_statement,
    masked_statement,
    threshold_of,
)
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import secure_pb2 as pb
from fedhds_server.aggregation.weights import site_shares
from fedhds_server.run.events import Instruction, NextStep, Outcome, ResultReceived, RoundAbandoned
from fedhds_server.run.parties import parties
from fedhds_server.run.secure_round import Member, SecureRound
from fedhds_server.run.state import Reply, RunState, Stage, Task, packed, unpacked
from fedhds_server.workflows.base import Load, Workflow, Workspace
from fedhds_server.workflows.secure_unmasking import secrets_of
from fedhds_server.workflows.training import TrainingWorkflow, row_limit, trainable_roles

MessageType = TypeVar("MessageType", bound=Message)


class Step(IntEnum):
    """The steps of a secure round, by their number in the stage."""

    KEYS = 0
    SHARES = 1
    MASK = 2
    LISTS = 3
    UNMASK = 4


_TITLES = ("keys", "shares of secrets", "masked updates", "list of updates", "unmasking")
_RESULTS: tuple[type[Message], ...] = (
    pb.RoundKeys,
    pb.SealedShares,
    pb.MaskedUpdate,
    pb.SignedSurvivors,
    pb.UnmaskingShares,
)
# Bytes of a site's part of a message, beside what is sealed or shared: its name and the fields around it.
_ENTRY_BYTES = 400


class SecureTrainingWorkflow(Workflow):
    """Keys, shares, masked updates, signed lists and unmasking shares; every step's list of sites is durable."""

    kind = "secure-train"
    collecting = "training"
    resolving = "aggregating"
    answers = "answers"
    masked = True
    abandons = True

    def title(self, state: RunState, stage: Stage) -> str:
        return f"round {stage.round_number} of {state.spec.rounds.count}, {_TITLES[stage.step]}"

    def closing(self, state: RunState, stage: Stage) -> str:
        return f"{self.title(state, stage)}: {len(stage.replies)} sites answered"

    def resolver(self, state: RunState) -> str:
        return "secure aggregation"

    def quorum(self, state: RunState, stage: Stage) -> int:
        if stage.secure is None:
            return max(state.spec.rounds.quorum_of(stage.target), state.spec.secure.min_sites)
        # What is in the sum is decided by the third step; after it, shares alone are needed.
        sums = stage.step <= Step.MASK
        return max(stage.secure.threshold, state.spec.secure.min_sites if sums else 0)

    def by_site(self, stage: Stage) -> bool:
        return stage.secure is not None

    def replaceable(self, state: RunState, stage: Stage) -> bool:
        return state.spec.selection.one_shot and stage.secure is None

    def request(self, state: RunState, task: Task) -> Message | Any:
        stage = state.stage
        if stage is None or stage.secure is None:
            return pb.KeysRequest()
        match stage.step:
            case Step.MASK:
                request = unpacked(stage.request, pb.MaskRequest)
                request.train.CopyFrom(TrainingWorkflow().request(state, task))
                return request
            case Step.UNMASK:
                return standing_for(stage.secure.requests[task.site])
            case Step.LISTS:
                return unpacked(stage.request, pb.SurvivorsRequest)
        return standing_for(stage.secure.peers)

    def upload_sizes(self, state: RunState, task: Task) -> range:
        stage = state.stage
        if stage is None or stage.secure is None or stage.step == Step.LISTS:
            return range(0)
        if stage.step == Step.MASK:
            size = 4 * (HEADER_VALUES + _values(state, task.round_number))
            return range(size, size + 1)
        return range(1, len(stage.secure.members) * (SEALED_BYTES + _ENTRY_BYTES) + 1)

    def upload_of(self, result: Any) -> Artifact | None:
        if result.Is(pb.MaskedUpdate.DESCRIPTOR):
            return Artifact.from_proto(_read(result, pb.MaskedUpdate).masked_update)
        return artifact_of(result)

    def check(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        stage = state.stage
        if stage is not None and stage.step in (Step.SHARES, Step.UNMASK):
            return "secure", "the answer is rejected: it did not come as an upload"
        return self._checked(state, task, result)

    def check_long(self, state: RunState, task: Task, result: Any, load: Load) -> tuple[str, str] | None:
        stage = state.stage
        if stage is None or stage.step not in (Step.SHARES, Step.UNMASK):
            raise RequestError("this step of a secure round has no result that is too long for a call")
        return self._checked(state, task, result)

    def _checked(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        stage = state.stage
        if stage is None:
            return None
        message = _read(result, _RESULTS[stage.step])
        try:
            _check(state, stage, task.site, message)
        except PeerNotVerified as error:
            return "secure", f"the answer is rejected: {error}"
        return None

    def accept(self, state: RunState, task: Task, event: ResultReceived) -> list[Instruction]:
        stage = state.stage
        if stage is None:
            return []
        long = event.artifact is not None and stage.step != Step.MASK
        message = "" if long else packed(_read(event.result, _RESULTS[stage.step]))
        stage.replies[task.site] = Reply(task_id=task.id, message=message, artifact=event.artifact, long=long)
        return []

    def resolve(self, state: RunState, stage: Stage, workspace: Workspace) -> Outcome:
        try:
            outcome = _resolved(state, stage, workspace)
        except DamagedArtifact as error:
            outcome = RoundAbandoned(str(error))
        if isinstance(outcome, RoundAbandoned):
            return RoundAbandoned(f"{_TITLES[stage.step]}: {outcome.reason}")
        return outcome


def _resolved(state: RunState, stage: Stage, workspace: Workspace) -> Outcome:
    secure = stage.secure
    if secure is None:
        return _keys_to_peers(state, stage, workspace)
    match stage.step:
        case Step.SHARES:
            return _shares_to_masks(state, stage, secure)
        case Step.MASK:
            return _updates_to_lists(state, stage, secure, workspace)
        case Step.LISTS:
            return _lists_to_requests(stage, secure, workspace)
    return _unmasked(state, stage, secure, workspace)


def _keys_to_peers(state: RunState, stage: Stage, workspace: Workspace) -> Outcome:
    limits = {site: row_limit(state, site) for site in sorted(stage.replies)}
    rows = {site: limit if state.spec.aggregation.weight_by == "rows" else 1 for site, limit in limits.items() if limit}
    if len(rows) > MAX_SITES:
        return RoundAbandoned(f"{len(rows)} sites sent keys, {MAX_SITES} is the most; set a smaller --cohort-fraction")
    threshold = threshold_of(len(rows), state.spec.secure.threshold)
    if reason := _too_few(state, list(rows), threshold):
        return RoundAbandoned(reason)
    weights = integer_weights(site_shares(rows, state.spec.aggregation.max_weight_share))
    peers, members = pb.RoundPeers(threshold=threshold), {}
    for site in rows:
        keys = unpacked(stage.replies[site].message, pb.RoundKeys)
        peers.peers.add(keys=keys, weight=weights[site])
        public_key = base64.b64encode(public_key_of_certificate(keys.certificates[0])).decode()
        members[site] = Member(weight=weights[site], rows=limits[site], public_key=public_key)
    artifact, terms = _kept(workspace, peers), _terms(state, stage, peers)
    secure = SecureRound(members=members, threshold=threshold, terms=terms.digest.hex(), peers=artifact)
    return NextStep(standing_for(artifact), artifact, secure=secure, sites=tuple(members))


def _shares_to_masks(state: RunState, stage: Stage, secure: SecureRound) -> Outcome:
    shares = {site: reply.artifact for site, reply in sorted(stage.replies.items()) if reply.artifact}
    if reason := _too_few(state, list(shares), secure.threshold):
        return RoundAbandoned(reason)
    return NextStep(pb.MaskRequest(sharing=shares), secure=secure.model_copy(update={"shares": shares}))


def _updates_to_lists(state: RunState, stage: Stage, secure: SecureRound, workspace: Workspace) -> Outcome:
    updates: list[Artifact] = []
    survivors: list[str] = []
    for site, reply in sorted(stage.replies.items()):
        try:
            if reply.artifact is not None:
                workspace.verified(reply.artifact)
                updates.append(reply.artifact)
                survivors.append(site)
        except DamagedArtifact:
            # The others unmask it as one that dropped out.
            continue
    if reason := _too_few(state, survivors, secure.threshold):
        return RoundAbandoned(reason)
    dropped = sorted(secure.shares.keys() - set(survivors))
    total = workspace.add_masked(updates)
    lists = pb.SurvivorsRequest(survivors=survivors, dropped=dropped)
    changed = {"survivors": survivors, "dropped": dropped, "total": total}
    return NextStep(lists, secure=secure.model_copy(update=changed), sites=tuple(survivors))


def _lists_to_requests(stage: Stage, secure: SecureRound, workspace: Workspace) -> Outcome:
    lists = unpacked(stage.request, pb.SurvivorsRequest)
    if len(stage.replies) < secure.threshold:
        return RoundAbandoned(f"{len(stage.replies)} sites signed, {secure.threshold} must")
    signatures = [
        pb.ListSignature(site=site, signature=unpacked(reply.message, pb.SignedSurvivors).signature)
        for site, reply in sorted(stage.replies.items())
    ]
    sealed: dict[str, list[pb.SealedShare]] = {site: [] for site in stage.replies}
    for sender, artifact in sorted(secure.shares.items()):
        try:
            content = workspace.verified(artifact).read_bytes()
        except DamagedArtifact:
            # Its secret may still be put together, if it is not needed or nobody asks for it.
            continue
        for share in _read(long_message(content), pb.SealedShares).shares:
            if share.site in sealed:
                sealed[share.site].append(pb.SealedShare(site=sender, sealed=share.sealed))
    requests = {
        site: _kept(workspace, pb.UnmaskRequest(lists=lists, signatures=signatures, shares=shares))
        for site, shares in sealed.items()
    }
    return NextStep(lists, secure=secure.model_copy(update={"requests": requests}))


def _unmasked(state: RunState, stage: Stage, secure: SecureRound, workspace: Workspace) -> Outcome:
    peers = _read(long_message(workspace.verified(secure.peers).read_bytes()), pb.RoundPeers)
    terms = _terms(state, stage, peers)
    opened = {}
    for site, reply in sorted(stage.replies.items()):
        if reply.artifact is not None:
            opened[site] = _read(long_message(workspace.verified(reply.artifact).read_bytes()), pb.UnmaskingShares)
    try:
        masks = secrets_of(terms, secure.survivors, secure.dropped, opened)
    except PeerNotVerified as error:
        return RoundAbandoned(str(error))
    return workspace.unmask(state, stage, masks)


def _terms(state: RunState, stage: Stage, peers: pb.RoundPeers) -> Terms:
    round_id = RoundId(state.run_id, stage.round_number)
    return Terms.of(round_id, peers, lambda chain, _: public_key_of_certificate(chain[0]))


def _too_few(state: RunState, sites: list[str], threshold: int) -> str:
    """Why a round cannot go on with `sites`; empty when it can."""
    least = state.spec.secure.min_sites
    if len(sites) >= threshold and len(parties(sites)) >= least:
        return ""
    return (
        f"{len(sites)} sites of {len(parties(sites))} certificates remain, secure aggregation needs {threshold} of "
        f"{least}"
    )


def _check(state: RunState, stage: Stage, site: str, message: Message) -> None:
    """Raises PeerNotVerified for an answer that the other sites, or the sum, could make nothing of."""
    round_id = RoundId(state.run_id, stage.round_number)
    secure = stage.secure
    match message:
        case pb.RoundKeys():
            check_shape(message)
            if message.site != site or not message.certificates:
                raise PeerNotVerified("the keys are under another name than the site's, or without a certificate")
            if message.adapter_digest != state.adapter.digest:
                raise PeerNotVerified("the keys are for another global adapter than the round's")
            public_key = public_key_of_certificate(message.certificates[0])
            if hashlib.sha256(public_key).hexdigest() != state.sites[site].key:
                raise PeerNotVerified("the keys come with another certificate than the site's connection has")
            check_signature(public_key, message.signature, keys_statement(round_id, message), site)
        case pb.SealedShares() if secure:
            receivers = [share.site for share in message.shares]
            if receivers != list(secure.members) or {len(share.sealed) for share in message.shares} != {SEALED_BYTES}:
                raise PeerNotVerified(f"the shares are not one for each site of the round, of {SEALED_BYTES} bytes")
        case pb.MaskedUpdate() if secure:
            if message.clipped_to != state.spec.secure.clip_norm:
                raise PeerNotVerified("the update is clipped to another norm than --secure-clip-norm")
            digest = message.masked_update.digest
            statement = masked_statement(round_id, bytes.fromhex(secure.terms), site, digest, message.clipped_to)
            check_signature(_key_of(secure, site), message.signature, statement, site)
        case pb.UnmaskingShares() if secure:
            for share in message.opened:
                kind = "seed_share" if share.owner in secure.survivors else "key_share"
                known = share.owner in secure.survivors or share.owner in secure.dropped
                if not known or share.WhichOneof("share") != kind or len(getattr(share, kind)) != SHARE_BYTES:
                    raise PeerNotVerified(f"the share of {share.owner[:200]!r} is none that this round opens")
        case pb.SignedSurvivors() if secure:
            terms, sharing = bytes.fromhex(secure.terms), sorted(secure.shares)
            statement = lists_statement(round_id, terms, site, sharing, secure.survivors, secure.dropped)
            check_signature(_key_of(secure, site), message.signature, statement, site)


def _key_of(secure: SecureRound, site: str) -> bytes:
    return base64.b64decode(secure.members[site].public_key)


def _values(state: RunState, round_number: int) -> int:
    manifest = state.adapter_manifest.only(trainable_roles(state, round_number))
    return manifest.size // 4


def _kept(workspace: Workspace, message: Message) -> Artifact:
    content = Any()
    content.Pack(message, deterministic=True)
    return workspace.keep(content.SerializeToString(deterministic=True))


def _read(result: Any, kind: type[MessageType]) -> MessageType:
    """The message in a result; raises RequestError when it is another one."""
    message = kind()
    try:
        if result.Unpack(message):
            message.DiscardUnknownFields()
            return message
    except DecodeError as error:
        raise RequestError("the answer's bytes are no message of its type") from error
    raise RequestError(
        f"this step of a secure round takes a {kind.DESCRIPTOR.full_name}, not a {result.TypeName()[:100]!r}"
    )
