"""A selection is not ended, captured or blown up by what one site says of its rows, nor a run by the first manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from fedhds.errors import AdapterError
from fedhds.grpc_errors import error_of
from fedhds.kmeans import SUM_UNIT
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2.selection_pb2 import ClusterReport, KMeansCenters, KMeansStats
from fedhds_server.run.state import Phase
from tests.support.attackers import ROWS, Attacker, SecureFederation
from tests.support.hostile import until
from tests.support.manifests import lora_manifest

pytestmark = pytest.mark.e2e

DIMENSION, BUDGET = 16, 6
COMMON = (
    "--rounds=1",
    "--evaluate-every=0",
    f"--selection-budget={BUDGET}",
    f"--feature-dimension={DIMENSION}",
    # The honest sites go on without the attacker.
    "--quorum=2",
    "--heartbeat-timeout=20",
)
HONEST = 40

Begin = Callable[..., SecureFederation]


@pytest.fixture
def begin(tmp_path: Path, model: Path) -> Iterator[Begin]:
    """Starts a coordinator, and the honest sites a and b unless `honest` is false."""
    made: list[SecureFederation] = []

    def start(*flags: str, sites: int = 3) -> SecureFederation:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        federation = SecureFederation(folder, model)
        made.append(federation)
        federation.begin(*COMMON, f"--min-sites={sites}", *flags)
        return federation

    yield start
    for federation in made:
        federation.stop()


def join(federation: SecureFederation) -> None:
    for name in "ab":
        federation.honest(name, "--allow-exact-kmeans-sums", rows=HONEST)


def attack(federation: SecureFederation, name: str) -> Attacker:
    """An attacker that takes part, once an honest site has registered."""
    attacker = federation.attacker(name)
    until(lambda: bool(federation.state.manifest))
    attacker.enroll()
    attacker.register()
    return attacker


def alone(begin: Begin, *flags: str) -> bytes:
    """The adapter of the honest sites when nobody attacks."""
    federation = begin(*flags, sites=2)
    join(federation)
    federation.finish()
    return federation.adapter


def test_a_vast_manifest_that_comes_first_is_refused_and_never_drawn(begin: Begin) -> None:
    federation = begin("--selection-strategy=random", sites=2)
    attacker = federation.attacker("attacker")
    attacker.enroll()
    digests = {field.name: "0" * 64 for field in pb.ModelFingerprint.DESCRIPTOR.fields}
    honest = lora_manifest({"q.lora_A.weight": (2, 8), "q.lora_B.weight": (8, 2)}).to_proto()
    vast = [
        lora_manifest({"q.lora_A.weight": (1, 1 << 30), "q.lora_B.weight": (8, 1)}).to_proto(),
        lora_manifest({"q.lora_A.weight": (2, 1 << 29), "q.lora_B.weight": (8, 2)}).to_proto(),
        lora_manifest({f"{n:04}.lora_{f}.weight": (1 << 20, 2) if f == "B" else (2, 1 << 20)
                       for n in range(160) for f in "AB"}).to_proto(),
        pb.AdapterManifest(tensors=honest.tensors[:1], config=honest.config),
    ]  # fmt: skip
    with federation.memory() as grown:
        for manifest in vast:
            request = pb.RegisterRequest(
                session=attacker.session, fingerprint=pb.ModelFingerprint(**digests), manifest=manifest, rows=ROWS
            )
            with pytest.raises(grpc.RpcError) as caught:
                attacker.stub.Register(request, timeout=60)
            assert isinstance(error_of(caught.value), AdapterError), caught.value
        assert grown() < 100 << 20
    assert not federation.state.manifest
    attacker.leave()
    join(federation)
    federation.finish()
    assert federation.adapter == alone(begin, "--selection-strategy=random")


def bad_cluster_reports() -> list[tuple[Message, str]]:
    """Reports that no strategy of FedHDS can have of eight rows."""
    flat = ClusterReport(dimension=0, unclustered=ROWS)
    many = ClusterReport(dimension=2)
    for number in range(16_000):
        many.centroids.add(cluster_id=number, values=[0, 1])
    uncounted = ClusterReport(dimension=2, noise_std=3, unclustered=ROWS)
    return [(flat, "do not have the 2 values"), (many, "more clusters than rows"), (uncounted, "noise that the run")]


def test_reports_that_cannot_be_right_end_no_run_and_no_restart(begin: Begin) -> None:
    flags = ("--selection-strategy=fedhds", "--reduction=pca")
    federation = begin(*flags, sites=2 + len(bad_cluster_reports()))
    join(federation)
    attackers = [attack(federation, name) for name in "xyz"]
    for attacker, (report, words) in zip(attackers, bad_cluster_reports(), strict=True):
        answer = attacker.complete(attacker.task().id, report)
        assert (answer.rejected, words in answer.reason) == (True, True), answer.reason
    until(lambda: federation.state.phase is Phase.RUNNING and federation.state.round_number == 1)
    federation.coordinator.kill()
    address = federation.address()
    federation.coordinator = federation.server(*COMMON, *flags, "--min-sites=5", listen=address)
    assert [federation.state.sites[name].rejections for name in "xyz"] == [1, 1, 1]
    for attacker in attackers:
        attacker.leave()
    federation.finish()
    assert federation.adapter == alone(begin, *flags)


class FakeRows:
    """Rows that an attacker makes up, one beside each center, so that they are nearest everywhere."""

    def report(self, centers: KMeansCenters | None) -> KMeansStats:
        """What the strategy asks of them, without any contradiction."""
        places = np.array(centers.values if centers else [0.0] * DIMENSION).reshape(-1, DIMENSION)
        rows = [self._beside(places[number % len(places)]) for number in range(ROWS)]
        labels = [int(((places - row) ** 2).sum(axis=1).argmin()) for row in rows]
        report = KMeansStats(dimension=DIMENSION)
        for label in sorted(set(labels)):
            members = np.array([row for row, own in zip(rows, labels, strict=True) if own == label])
            sums = np.rint(members * SUM_UNIT).astype(np.int64).sum(axis=0)
            cluster = report.clusters.add(cluster_id=label, count=len(members), sums=sums.tolist())
            if centers is not None and centers.last:
                cluster.nearest = float(((members - places[label]) ** 2).sum(axis=1).min())
        return report

    @staticmethod
    def _beside(center: np.ndarray) -> np.ndarray:
        length = float(np.linalg.norm(center))
        beside: np.ndarray = center / length if length else np.eye(DIMENSION)[0]
        return beside


def picks_of(federation: SecureFederation) -> dict[str, int]:
    """Rows that each site was asked to train on."""
    state = federation.state
    picks = {site: state.coreset_of(site).picks for site in state.coresets}
    return {site: sum(pick.count for pick in own.clusters) + own.unclustered for site, own in picks.items()}


@pytest.mark.parametrize("claim", [None, 0.0])
def test_a_site_that_is_nearest_everywhere_gets_no_more_than_its_part(begin: Begin, claim: float | None) -> None:
    """Its rows are made up beside the centers; or it claims to lie on all of them, which may be found out."""
    federation = begin("--selection-strategy=federated-kmeans", "--kmeans-iterations=1")
    join(federation)
    attacker, fake = attack(federation, "attacker"), FakeRows()
    last = False
    while not last:
        task, centers = attacker.task(), KMeansCenters()
        asked = centers if task.request.Unpack(centers) else None
        last = asked is not None and asked.last
        report = fake.report(asked)
        for cluster in report.clusters:
            if last and claim is not None:
                cluster.nearest = claim
        answer = attacker.complete(task.id, report)
        assert answer.accepted or (last and claim == 0 and "does not fit" in answer.reason), answer.reason
    until(lambda: bool(federation.state.coresets))
    picks = picks_of(federation)
    assert picks.get("attacker", 0) <= BUDGET // 2
    assert sum(picks.values()) == BUDGET
    attacker.leave()
    federation.finish()


def test_centroids_far_apart_do_not_shut_the_honest_sites_out(begin: Begin) -> None:
    federation = begin("--selection-strategy=fedhds-aligned", "--reduction=pca", sites=4)
    join(federation)
    beyond, within = attack(federation, "beyond"), attack(federation, "within")

    def report(length: float) -> ClusterReport:
        made = ClusterReport(dimension=DIMENSION)
        for number in range(ROWS // 2):
            made.centroids.add(cluster_id=number, size=2, values=length * np.eye(DIMENSION)[number])
        return made

    answer = beyond.complete(beyond.task().id, report(1e6))
    assert (answer.rejected, "longer than a mean" in answer.reason) == (True, True), answer.reason
    assert within.complete(within.task().id, report(1.0)).accepted
    until(lambda: bool(federation.state.coresets))
    picks = picks_of(federation)
    assert "beyond" not in picks
    assert picks["within"] <= BUDGET // 2
    assert sum(picks.values()) == BUDGET
    for attacker in (beyond, within):
        attacker.leave()
    federation.finish()
