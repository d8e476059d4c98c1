"""The task "secure-train": one step of a round under secure aggregation; in the third of them the site trains."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import SecureAggregationError, TaskError
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import secure_pb2
from fedhds_client.state_files import file_key
from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult
from fedhds_client.tasks.train import TrainTask

if TYPE_CHECKING:
    from fedhds_client.secure.site_round import SiteRound

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskedFile:
    """A masked update on disk, kept until the coordinator has it."""

    path: Path
    artifact: Artifact


class SecureTrainTask(SiteTask):
    """Answers each step from the round's record, and masks the update that training gives."""

    doing = "training for a secure sum"

    def run(self, context: TaskContext) -> TaskResult:
        request = context.task.request
        site_round = _opened(context)
        if request.Is(secure_pb2.KeysRequest.DESCRIPTOR):
            return TaskResult(site_round.keys())
        if request.Is(secure_pb2.RoundPeers.DESCRIPTOR):
            return TaskResult(site_round.shares(context.request(secure_pb2.RoundPeers)))
        if request.Is(secure_pb2.SurvivorsRequest.DESCRIPTOR):
            return TaskResult(site_round.sign(context.request(secure_pb2.SurvivorsRequest)))
        if request.Is(secure_pb2.UnmaskRequest.DESCRIPTOR):
            return TaskResult(site_round.open(context.request(secure_pb2.UnmaskRequest)))
        return _masked(context, site_round, context.request(secure_pb2.MaskRequest))


def _opened(context: TaskContext) -> SiteRound:
    from fedhds.secure.keys import RoundId
    from fedhds.secure.signatures import Authority, Signer
    from fedhds.security.credentials import TlsFiles
    from fedhds_client.secure.site_round import SiteRound

    spec, settings = context.models.spec, context.settings
    if not spec.secure.enabled:
        raise TaskError(
            "the run has no secure aggregation, and this is a step of it: the coordinator breaks its own rules"
        )
    tls = TlsFiles.from_settings(settings.tls_ca, settings.tls_cert, settings.tls_key)
    if tls is None:
        raise SecureAggregationError("secure aggregation needs --tls-ca, --tls-cert and --tls-key at every site")
    return SiteRound(
        _folder(context) / "secure-round.json",
        RoundId(context.run_id, context.task.round_number),
        context.site.name,
        spec,
        Signer(tls),
        Authority(tls.ca),
        adapter=context.adapter.name,
        min_parties=settings.rules.require_secure_sites,
    )


def _masked(context: TaskContext, site_round: SiteRound, request: secure_pb2.MaskRequest) -> TaskResult:
    from fedhds_client.secure.masked_update import write_masked
    from fedhds_client.updates.update import FinishedUpdate

    site, number = context.site, context.task.round_number
    site_round.begin_masking(request.sharing)
    path = _folder(context) / f"masked-{number}.bin"
    answer = site_round.masked(path)
    if answer is None:
        # Data order and dropout follow from it: the same training as in the clear.
        inner = pb.Task(id=f"train/{number}/{site.name}", round_number=number, kind="train")
        inner.request.Pack(request.train)
        update = TrainTask().trained(replace(context, task=inner)).update
        if not isinstance(update, FinishedUpdate):
            raise SecureAggregationError(f"round {number} picks no row of this site, which has no update to mask")
        for old in path.parent.glob("masked-*.bin"):
            old.unlink(missing_ok=True)
        manifest = context.models.model.manifest()
        artifact, norm = write_masked(
            path,
            site_round,
            update=update.path,
            adapter=context.adapter,
            manifest=manifest,
            roles=frozenset(request.train.trainable_roles) or manifest.roles,
            loss=update.metadata.loss,
        )
        answer = site_round.keep_masked(artifact)
        # From here on only the masked bytes may leave, so nothing else is kept.
        update.path.unlink(missing_ok=True)
        clipped = norm > answer.clipped_to
        text = "%s: round %d's update is masked among %d sites%s"
        logger.info(
            text, site.name, number, len(request.sharing), f" and was clipped from {norm:.4g}" if clipped else ""
        )
    return TaskResult(answer, MaskedFile(path, Artifact.from_proto(answer.masked_update)))


def _folder(context: TaskContext) -> Path:
    return context.site.folder / file_key(context.run_id)
