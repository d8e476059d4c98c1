"""What a round under secure aggregation costs beside one in the clear: both with the daemons' parts, in this process.

Without training and network: sites write what they would upload, and the coordinator reads it from its disk. Seconds of
a round are those of the slowest site and of the coordinator, as sites compute at the same time.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from benchmarks.transport_load import manifest_of
from fedhds.long_messages import artifact_of, long_message, standing_for
from fedhds.secure.keys import RoundId
from fedhds.secure.signatures import Authority, Signer
from fedhds.security.identity import Role, identity_from_certificate
from fedhds.security.pki import init_authority, issue
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.safetensors import write_adapter
from fedhds.v2 import federation_pb2, secure_pb2, selection_pb2
from fedhds_client.secure.masked_update import write_masked
from fedhds_client.secure.site_round import SiteRound
from fedhds_server.coordinator.effects import Effects
from fedhds_server.rpc.validation import check_update
from fedhds_server.run import rounds, stages
from fedhds_server.run.events import AdapterUpdated, RoundAbandoned
from fedhds_server.run.state import Phase, Reply, RunState, Site, SiteState, packed
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.workflows import WORKFLOWS
from fedhds_server.workflows.secure_training import SecureTrainingWorkflow, Step
from fedhds_server.workflows.training import TrainingWorkflow

ADAPTERS_MIB = (7.6, 20.0)
SITES = (3, 8, 32, 100)
DROPOUTS = (0.0, 0.1)
_LARGEST = 1 << 30


@dataclass
class Cost:
    """What one round takes."""

    site_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    site_cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    coordinator_s: float = 0.0
    coordinator_cpu_s: float = 0.0
    bytes_sent: int = 0
    """By all sites and to all sites."""

    @contextmanager
    def site(self, name: str) -> Iterator[None]:
        """Measures a part of a site's work."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.site_s[name] += time.perf_counter() - wall
        self.site_cpu_s[name] += time.process_time() - cpu

    @contextmanager
    def coordinator(self) -> Iterator[None]:
        """Measures a part of the coordinator's work."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.coordinator_s += time.perf_counter() - wall
        self.coordinator_cpu_s += time.process_time() - cpu

    def line(self) -> dict[str, float]:
        """For a table."""
        return {
            "seconds": round(max(self.site_s.values()) + self.coordinator_s, 4),
            "site_cpu_s": round(max(self.site_cpu_s.values()), 4),
            "coordinator_cpu_s": round(self.coordinator_cpu_s, 4),
            "bytes": self.bytes_sent,
        }


class Round:
    """One round of `count` sites on an adapter of `mib`."""

    def __init__(self, folder: Path, certificates: Path, count: int, mib: float, *, secure: bool) -> None:
        self.folder, self.certificates, self.cost = folder, certificates, Cost()
        self.manifest = manifest_of(int(mib * (1 << 20)))
        self.names = [f"s{number:03d}" for number in range(count)]
        settings = {"secure_aggregation": True, "min_secure_sites": 3} if secure else {}
        self.spec = RunSpec.of(model="m", rounds=1, min_sites=count, max_weight_share=1.0, **settings)
        self.store = ArtifactStore(folder / "artifacts", largest_upload=_LARGEST)
        adapter = self.stored(self.written(folder / "adapter", 0))
        keys = {
            name: identity_from_certificate((certificates / f"{name}.crt").read_bytes()).key_fingerprint
            for name in self.names
        }
        self.state = RunState(
            run_id="run",
            spec=self.spec,
            phase=Phase.RUNNING,
            round_number=1,
            round_size=count,
            sites={name: Site(name=name, state=SiteState.ENROLLED, rows=10, key=keys[name]) for name in self.names},
            adapters={0: adapter},
            manifest=packed(self.manifest.to_proto()),
            coresets=dict.fromkeys(self.names, packed(selection_pb2.Coreset(all=selection_pb2.AllRows()))),
        )
        self.effects = Effects(
            SimpleNamespace(artifacts=self.store, folder=folder, state=self.state),  # type: ignore[arg-type]
            keep_updates=False,
        )
        self.workflow = WORKFLOWS[(SecureTrainingWorkflow if secure else TrainingWorkflow).kind]
        stages.open_stage(self.state, self.workflow.kind, list(self.names), count)

    def written(self, path: Path, seed: int) -> Path:
        """An adapter on disk."""
        random = np.random.default_rng(seed)
        write_adapter(
            path, self.manifest, lambda tensor: random.standard_normal(tensor.shape, np.float32) * 1e-3, "float32"
        )
        return path

    def stored(self, path: Path) -> Artifact:
        """A file at the coordinator."""
        artifact = Artifact.of_file(path)
        self.store.adopt(path, artifact)
        return artifact

    def plain(self, staying: int) -> dict[str, float]:
        """A round in the clear of the first `staying` sites; its cost."""
        stage, adapter = self.state.stage, self.state.adapter
        assert stage is not None
        self.cost.bytes_sent += adapter.size * len(self.names)
        for seed, name in enumerate(self.names[:staying], 1):
            with self.cost.site(name):
                update = self.written(self.folder / "update", seed)
            self.cost.bytes_sent += update.stat().st_size
            with self.cost.coordinator():
                artifact = self.stored(update)
                current = self.store.verified(adapter)
                check_update(self.store.path(artifact), self.manifest, current=current, max_norm=0.0)
            message = packed(federation_pb2.TrainResult(samples=10, loss=1.0))
            stage.replies[name] = Reply(task_id=name, message=message, artifact=artifact)
        self._resolved()
        return self.cost.line()

    def secure(self, staying: int) -> dict[str, float]:
        """A secure round in which the sites after the first `staying` drop out with their update; its cost."""
        adapter = self.state.adapter
        self.cost.bytes_sent += adapter.size * len(self.names)
        updates = {name: self.folder / f"update-{name}" for name in self.names[:staying]}
        for seed, (name, path) in enumerate(updates.items(), 1):
            # As in the clear: the update is written before it is masked.
            with self.cost.site(name):
                self.written(path, seed)
        while (stage := self.state.stage) is not None:
            for name in stage.cohort[: staying if stage.step >= Step.MASK else None]:
                self._answer(name, updates)
            if self._resolved():
                break
        return self.cost.line()

    def _answer(self, name: str, updates: dict[str, Path]) -> None:
        stage = self.state.stage
        assert stage is not None
        request = self.workflow.request(self.state, self.state.tasks[stage.task_id(name)])
        artifact = artifact_of(request) if isinstance(request, AnyMessage) else None
        content = self.store.verified(artifact).read_bytes() if artifact else b""
        assert request is not None
        self.cost.bytes_sent += len(content) or request.ByteSize()
        upload: Path | None = None
        with self.cost.site(name):
            site_round = SiteRound(
                self.folder / f"{name}.json",
                RoundId("run", 1),
                name,
                self.spec,
                _signer(self.certificates, name),
                Authority(self.certificates / "ca.crt"),
                adapter=self.state.adapter.digest,
            )
            answer: Message
            match Step(stage.step):
                case Step.KEYS:
                    answer = site_round.keys()
                case Step.SHARES:
                    answer = site_round.shares(_unpacked(content, secure_pb2.RoundPeers()))
                case Step.MASK:
                    site_round.begin_masking(sorted(self.names))
                    upload = self.folder / f"masked-{name}"
                    masked, _ = write_masked(
                        upload,
                        site_round,
                        update=updates[name],
                        adapter=self.store.path(self.state.adapter),
                        manifest=self.manifest,
                        roles=self.manifest.roles,
                        loss=1.0,
                    )
                    answer = site_round.keep_masked(masked)
                case Step.LISTS:
                    assert isinstance(request, secure_pb2.SurvivorsRequest)
                    answer = site_round.sign(request)
                case Step.UNMASK:
                    answer = site_round.open(_unpacked(content, secure_pb2.UnmaskRequest()))
        self.cost.bytes_sent += upload.stat().st_size if upload else answer.ByteSize()
        with self.cost.coordinator():
            self._take(name, answer, upload)

    def _take(self, name: str, answer: Message, upload: Path | None) -> None:
        stage = self.state.stage
        assert stage is not None
        task, result, artifact = self.state.tasks[stage.task_id(name)], AnyMessage(), None
        result.Pack(answer)
        if long := stage.step in (Step.SHARES, Step.UNMASK):
            path = self.store.scratch("result")
            path.write_bytes(result.SerializeToString())
            artifact = self.stored(path)
            rejection = self.workflow.check_long(self.state, task, result, lambda _: b"")
        else:
            rejection = self.workflow.check(self.state, task, result)
            artifact = self.stored(upload) if upload else None
        assert rejection is None, rejection
        message = packed(standing_for(artifact) if long and artifact else answer)
        stage.replies[name] = Reply(task_id=task.id, message="" if long else message, artifact=artifact, long=long)

    def _resolved(self) -> bool:
        """Resolves the stage; whether the round is over."""
        stage = self.state.stage
        assert stage is not None
        stage.closed = True
        with self.cost.coordinator():
            outcome = self.workflow.resolve(self.state, stage, self.effects)
        assert not isinstance(outcome, RoundAbandoned), outcome
        if isinstance(outcome, AdapterUpdated):
            return True
        self.state.tasks = {}
        rounds.resolved(self.state, outcome, 0.0)
        return False


def _signer(certificates: Path, name: str) -> Signer:
    return Signer(SimpleNamespace(key=certificates / f"{name}.key", cert=certificates / f"{name}.crt"))  # type: ignore[arg-type]


def _unpacked(content: bytes, message: Any) -> Any:
    assert long_message(content).Unpack(message)
    return message


def measure(arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Both rounds in each case, one after the other."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        certificates = Path(made) / "certs"
        init_authority(certificates)
        for number in range(max(arguments.sites)):
            issue(certificates, f"s{number:03d}", role=Role.SITE)
        for mib in arguments.adapters:
            for count in arguments.sites:
                for share in arguments.dropouts:
                    staying = count - math.floor(share * count)
                    if share and staying == count:
                        continue
                    line: dict[str, Any] = {"adapter_mib": mib, "sites": count, "dropouts": count - staying}
                    for path, secure in (("plain", False), ("secure", True)):
                        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                            case = Round(Path(folder), certificates, count, mib, secure=secure)
                            line[path] = case.secure(staying) if secure else case.plain(staying)
                    for what in ("seconds", "bytes"):
                        line[f"{what}_ratio"] = round(line["secure"][what] / line["plain"][what], 3)
                    write(line)


def main() -> None:
    """Measures and prints a line for each case."""
    parser = argparse.ArgumentParser(prog="secure", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk that makes files durable")
    parser.add_argument("--sites", nargs="+", type=int, default=SITES)
    parser.add_argument("--adapters", nargs="+", type=float, default=ADAPTERS_MIB, help="MiB of float32")
    parser.add_argument("--dropouts", nargs="+", type=float, default=DROPOUTS, help="shares of the sites")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    def write(line: dict[str, Any]) -> None:
        line["machine"] = platform.machine()
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    measure(arguments, write)


if __name__ == "__main__":
    main()
