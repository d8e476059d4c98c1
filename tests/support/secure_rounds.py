"""A secure round without processes: the coordinator's own workflow and workspace, and the sites' own rounds."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from fedhds.errors import FedhdsError
from fedhds.long_messages import artifact_of, long_message, standing_for
from fedhds.secure.keys import RoundId
from fedhds.secure.masks import uniform
from fedhds.secure.quantization import WEIGHT_UNIT, Ring32
from fedhds.secure.signatures import Authority, Signer
from fedhds.security.identity import Role, identity_from_certificate
from fedhds.security.pki import init_authority, issue
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.v2 import secure_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_client.secure.masked_update import write_masked
from fedhds_client.secure.site_round import SiteRound
from fedhds_server.coordinator.effects import Effects
from fedhds_server.run import stages
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import Resolve, ResultReceived, SiteSilent, StageResolved, TaskFailed
from fedhds_server.run.state import ClosedRound, Phase, RunState, Site, SiteState, packed
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.workflows import WORKFLOWS
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
LOSS = 1.5
KIND = "secure-train"


@cache
def certificates() -> Path:
    """A folder with an authority and the certificates of twelve sites, for all tests of a process."""
    folder = Path(tempfile.mkdtemp(prefix="fedhds-secure-"))
    init_authority(folder)
    for name in "abcdefghijkl":
        issue(folder, name, role=Role.SITE)
    return folder


def signer(site: str) -> Signer:
    """What `site` signs with."""
    folder, party = certificates(), site.partition("/")[0]
    return Signer(SimpleNamespace(key=folder / f"{party}.key", cert=folder / f"{party}.crt"))  # type: ignore[arg-type]


@dataclass
class SecureRun:
    """A run whose sites answer in this process; what the coordinator receives is in `received`."""

    folder: Path
    names: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    manifest: AdapterManifest = MANIFEST
    updates: dict[str, float] = field(default_factory=dict)
    """What each site adds to every value of the adapter."""
    received: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Site, type of message, and bytes; of a masked update the upload's."""
    rounded: dict[str, Any] = field(default_factory=dict)
    """What each site added to the sum, before its masks."""
    failures: dict[str, FedhdsError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = {"min_secure_sites": 3, "min_sites": 3, "aggregator": "fedavg", "max_weight_share": 1.0}
        self.spec = RunSpec.of(model="m", rounds=9, secure_aggregation=True, **{**base, **self.settings})
        self.store = ArtifactStore(self.folder / "artifacts", largest_upload=1 << 30)
        path = self.store.scratch("first")
        adapter = write_adapter(path, self.manifest, lambda tensor: np.full(tensor.shape, 0.25, np.float32), "float32")
        self.store.adopt(path, adapter)
        rows = {name: self.rows.get(name, 5) for name in self.names}
        whole = selection_pb2.Coreset(all=selection_pb2.AllRows())
        self.weights: dict[str, int] = {}
        state = RunState(
            run_id="run",
            spec=self.spec,
            phase=Phase.RUNNING,
            round_number=1,
            round_size=len(self.names),
            sites={
                name: Site(
                    name=name,
                    state=SiteState.ENROLLED,
                    rows=rows[name],
                    key=identity_from_certificate((certificates() / f"{name[0]}.crt").read_bytes()).key_fingerprint,
                )
                for name in self.names
            },
            adapters={0: adapter},
            manifest=packed(self.manifest.to_proto()),
            coresets=dict.fromkeys(self.names, packed(whole)),
        )
        self.machine = RunMachine(state)
        self.effects = Effects(
            SimpleNamespace(artifacts=self.store, folder=self.folder, state=state),  # type: ignore[arg-type]
            keep_updates=False,
        )
        stages.open_stage(state, KIND, sorted(self.names), len(self.names))

    @property
    def state(self) -> RunState:
        """The coordinator's."""
        return self.machine.state

    def site_round(self, site: str, number: int | None = None, **settings: Any) -> SiteRound:
        """The site's round as a process that has just started opens it."""
        folder = self.folder / "sites" / site.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        return SiteRound(
            folder / "secure-round.json",
            RoundId(self.state.run_id, number or self.state.round_number),
            site,
            self.spec,
            signer(site),
            Authority(certificates() / "ca.crt"),
            **{"adapter": self.state.adapter.digest, **settings},
        )

    def update(self, site: str) -> Path:
        """The site's trained adapter on disk."""
        path = self.folder / "sites" / f"update-{site.replace('/', '-')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with AdapterReader(self.store.verified(self.state.adapter), self.manifest) as base:
            added = self.updates.get(site, 0.01 * (1 + self.names.index(site)))
            write_adapter(path, self.manifest, lambda tensor: base.tensor(tensor) + np.float32(added), "float32")
        return path

    def masked(self, site_round: SiteRound, site: str, sharing: Collection[str]) -> tuple[pb.MaskedUpdate, Path]:
        """The site's third answer, and its upload."""
        path = self.folder / "sites" / f"masked-{site.replace('/', '-')}"
        site_round.begin_masking(list(sharing))
        if answer := site_round.masked(path):
            return answer, path
        self.rounded[site] = self.rounded_update(site_round, site)
        artifact, _ = write_masked(
            path,
            site_round,
            update=self.update(site),
            adapter=self.store.verified(self.state.adapter),
            manifest=self.manifest,
            roles=self.manifest.roles,
            loss=LOSS,
        )
        return site_round.keep_masked(artifact), path

    def rounded_update(self, site_round: SiteRound, site: str) -> Any:
        """What the site adds to the sum of all values, int64, without masks."""
        with (
            AdapterReader(self.store.verified(self.state.adapter), self.manifest) as base,
            AdapterReader(self.update(site), self.manifest) as update,
        ):
            parts = [update.tensor(spec).astype(np.float64) - base.tensor(spec) for spec in self.manifest.tensors]
        difference = np.concatenate([part.reshape(-1) for part in parts])
        # Clipped to the run's norm; rounded tensor by tensor with one stream.
        difference *= min(1.0, self.spec.secure.clip_norm / float(np.linalg.norm(difference)))
        noise = uniform(site_round.rounding(), len(difference))
        return site_round.ring.encode(difference, site_round.weight, noise).astype(np.int32).astype(np.int64)

    def asked(self, site: str) -> AnyMessage:
        """What the open task of `site` asks."""
        stage = self.state.stage
        assert stage is not None
        task = self.state.tasks[stage.task_id(site)]
        request = WORKFLOWS[KIND].request(self.state, task)
        assert request is not None
        if not isinstance(request, AnyMessage):
            message = AnyMessage()
            message.Pack(request)
            request = message
        artifact = artifact_of(request)
        if artifact is None:
            return request
        assert artifact in self.state.downloads
        return long_message(self.store.verified(artifact).read_bytes())

    def answer(self, site: str, request: AnyMessage) -> tuple[Message, Path | None]:
        """What the site says to a request, from any coordinator."""
        site_round = self.site_round(site)
        if request.Is(pb.KeysRequest.DESCRIPTOR):
            return site_round.keys(), None
        if request.Is(pb.RoundPeers.DESCRIPTOR):
            return site_round.shares(pb.RoundPeers.FromString(request.value)), None
        if request.Is(pb.MaskRequest.DESCRIPTOR):
            return self.masked(site_round, site, pb.MaskRequest.FromString(request.value).sharing)
        if request.Is(pb.SurvivorsRequest.DESCRIPTOR):
            return site_round.sign(pb.SurvivorsRequest.FromString(request.value)), None
        return site_round.open(pb.UnmaskRequest.FromString(request.value)), None

    def respond(self, site: str) -> None:
        """The site answers its open task, twice, as if the first answer was lost; the coordinator takes the second."""
        stage = self.state.stage
        assert stage is not None
        request = self.asked(site)
        try:
            message, upload = self.answer(site, request)
            assert self.answer(site, request)[0] == message
        except FedhdsError as error:
            self.failures[site] = error
            self.machine.apply(TaskFailed(0.0, stage.task_id(site), str(error)))
            return
        content = upload.read_bytes() if upload else message.SerializeToString(deterministic=True)
        self.received.append((site, message.DESCRIPTOR.name, content))
        self.take(site, message, content)

    def take(self, site: str, message: Message, content: bytes = b"") -> tuple[str, str] | None:
        """The coordinator gets an answer; why it rejects it, if it does."""
        stage, workflow = self.state.stage, WORKFLOWS[KIND]
        assert stage is not None
        task = self.state.tasks[stage.task_id(site)]
        result, artifact = AnyMessage(), None
        result.Pack(message, deterministic=True)
        if isinstance(message, pb.SealedShares | pb.UnmaskingShares):
            artifact = self.stored(result.SerializeToString(deterministic=True))
            rejection = workflow.check_long(self.state, task, result, lambda _: b"")
            result = standing_for(artifact)
        else:
            rejection = workflow.check(self.state, task, result)
            if isinstance(message, pb.MaskedUpdate):
                artifact = self.stored(content)
        if artifact:
            assert artifact.size in workflow.upload_sizes(self.state, task)
        if rejection is None:
            self.machine.apply(ResultReceived(0.0, task.id, result, artifact))
        return rejection

    def stored(self, content: bytes) -> Artifact:
        """An upload."""
        path = self.store.scratch("upload")
        path.write_bytes(content)
        artifact = Artifact.of_file(path)
        self.store.adopt(path, artifact)
        return artifact

    def close(self) -> None:
        """Everything that the machine asks for until it waits for sites again, as after a crash at any point of it."""
        self.machine._moved_at = 0.0
        self.machine.advance()
        while (pending := self.machine.pending()) and isinstance(pending[0], Resolve):
            stage = self.state.stage
            assert stage is not None
            # A crash may come after all files are written: what is decided again is the same.
            if stage.secure is not None:
                self.weights = {site: member.weight for site, member in stage.secure.members.items()}
            outcomes = [WORKFLOWS[KIND].resolve(self.state, stage, self.effects) for _ in range(2)]
            assert outcomes[0] == outcomes[1]
            number = self.state.round_number
            self.machine.handle(StageResolved(0.0, stage.name, outcomes[0]))
            if self.state.round_number != number or self.state.phase.over:
                return

    def play(self, lost: dict[int, Collection[str]] | None = None) -> ClosedRound:
        """One round, in which the sites `lost[step]` go away before they answer that step."""
        lost, number = lost or {}, self.state.round_number
        while self.state.round_number == number and not self.state.phase.over:
            stage = self.state.stage
            assert stage is not None
            for site in lost.get(stage.step, ()):
                self.machine.apply(SiteSilent(0.0, site))
            for site in stage.cohort:
                if self.state.sites[site].live and stage.task_id(site) in self.state.tasks:
                    self.respond(site)
            step = stage.step
            self.close()
            after = self.state.stage
            if self.state.round_number == number and after is not None and after.step == step and not after.closed:
                # It waits for sites that may come back: a deadline ends that.
                after.deadline_reached = True
                self.close()
        return self.state.closed_rounds[-1]

    def values(self) -> dict[str, Any]:
        """The global adapter."""
        with AdapterReader(self.store.verified(self.state.adapter), self.manifest) as reader:
            return {tensor.name: reader.tensor(tensor) for tensor in self.manifest.tensors}


def plain_values(run: SecureRun, members: int, weights: dict[str, int]) -> dict[str, Any]:
    """The plain weighted mean of the same rounded updates of the sites with `weights`, in whole numbers."""
    scale, values, begin = Ring32(run.spec.secure.clip_norm, members).scale, {}, 0
    with AdapterReader(run.store.verified(run.state.adapters[0]), run.manifest) as base:
        for tensor in run.manifest.tensors:
            end = begin + math.prod(tensor.shape)
            total = sum(run.rounded[site][begin:end] for site in weights)
            mean = total * (WEIGHT_UNIT / (scale * sum(weights.values())))
            values[tensor.name] = (base.tensor(tensor) + mean.reshape(tensor.shape)).astype(np.float32)
            begin = end
    return values
