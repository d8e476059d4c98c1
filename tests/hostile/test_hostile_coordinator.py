"""A coordinator that means harm, against a real site: what it sends is checked against the site's own model."""
# ruff: noqa: N802 - the names of methods are those of the protocol

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedhds import errors
from fedhds.runtime.logging import configure_logging
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.tensors.safetensors import write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import transfer_pb2
from fedhds_client.computation import ComputeThread
from fedhds_client.distributed.process_group import ProcessGroup
from fedhds_client.executor import TaskExecutor
from fedhds_client.progress import ProgressDisplay
from fedhds_client.rpc_client import CoordinatorClient
from fedhds_client.settings import ClientSettings
from fedhds_client.site import open_sites
from fedhds_client.site_loop import SiteLoop
from tests.support.tiny import write_rows

EVIL = "evil\x1b[2J\u202etext\n12:00:00 INFO forged"
CARD = "---\ntags: [fedhds]\n---\n\n# Adapter\n\n| rounds | 1 |\n"


class Coordinator(rpc.FederationServicer):
    """Answers as a test tells it to; by default as an honest one whose run is one evaluation long."""

    def __init__(self, spec: str, manifest: AdapterManifest, folder: Path) -> None:
        self.spec, self.manifest, self.folder = spec, manifest, folder
        self.enrollment: dict[str, Any] = {}
        self.adapters = [self.adapter(0.01)]
        self.tasks: list[pb.Task] = []
        self.waits: list[str] = []
        self.done: dict[str, Any] = {}
        self.extra = b""
        self.calls: list[tuple[str, Any]] = []

    def adapter(self, value: float, manifest: AdapterManifest | None = None) -> Artifact:
        """An adapter of that value that can be downloaded."""
        path = self.folder / f"adapter-{value}"
        artifact = write_adapter(
            path, manifest or self.manifest, lambda tensor: np.full(tensor.shape, value, np.float32), "float32"
        )
        path.rename(self.folder / artifact.digest)
        return artifact

    def evaluate(self, artifact: Artifact, number: int = 1) -> pb.Task:
        """A task on an adapter."""
        return pb.Task(id=f"evaluate/{number}/ward", kind="evaluate", round_number=number, adapter=artifact.to_proto())

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]

    async def Enroll(self, request: Any, context: Any) -> pb.EnrollResponse:
        self.calls.append(("Enroll", request))
        honest = {"session": request.session, "run_id": "run", "spec": self.spec, "heartbeat_timeout_s": 60.0}
        return pb.EnrollResponse(**{**honest, **self.enrollment})

    async def Register(self, request: Any, context: Any) -> pb.RegisterResponse:
        self.calls.append(("Register", request))
        return pb.RegisterResponse()

    async def NextTask(self, request: Any, context: Any) -> pb.NextTaskResponse:
        self.calls.append(("NextTask", request))
        if self.waits:
            return pb.NextTaskResponse(wait=pb.Wait(reason=self.waits.pop(0)))
        if self.tasks:
            return pb.NextTaskResponse(task=self.tasks.pop(0))
        honest = {
            "outcome": "completed",
            "message": "1 rounds are done",
            "adapter": self.adapters[-1].to_proto(),
            "adapter_config": self.manifest.config,
            "model_card": CARD,
        }
        return pb.NextTaskResponse(done=pb.Done(**{**honest, **self.done}))

    async def Heartbeat(self, request: Any, context: Any) -> pb.HeartbeatResponse:
        return pb.HeartbeatResponse()

    async def Download(self, request: Any, context: Any) -> AsyncIterator[transfer_pb2.DownloadResponse]:
        self.calls.append(("Download", request))
        content = (self.folder / request.artifact.digest).read_bytes() + self.extra
        for at in range(request.offset, len(content), 1 << 16):
            yield transfer_pb2.DownloadResponse(chunk=content[at : at + (1 << 16)])

    async def CompleteTask(self, request: Any, context: Any) -> pb.CompleteTaskResponse:
        self.calls.append(("CompleteTask", request))
        return pb.CompleteTaskResponse(accepted=True)

    async def FailTask(self, request: Any, context: Any) -> pb.FailTaskResponse:
        self.calls.append(("FailTask", request))
        return pb.FailTaskResponse()

    async def ConfirmDelivery(self, request: Any, context: Any) -> pb.ConfirmDeliveryResponse:
        self.calls.append(("ConfirmDelivery", request))
        return pb.ConfirmDeliveryResponse()


@dataclass
class World:
    """One site, and the coordinator that it meets."""

    folder: Path
    model: Path
    coordinator: Coordinator
    address: str
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def adapters(self) -> list[str]:
        """What the site keeps of global adapters."""
        return sorted(path.name for path in (self.folder / "state").glob("*/adapters/*"))

    def respecified(self, **settings: Any) -> None:
        """Another specification for the site."""
        self.coordinator.spec = RunSpec.model_validate_json(self.coordinator.spec).replace(**settings).model_dump_json()

    async def live(self) -> bool:
        """The site's life, in this process."""
        settings = ClientSettings(
            data=(self.folder / "rows.jsonl",),
            eval_data=self.folder / "rows.jsonl",
            server=self.address,
            name=("ward",),
            state=self.folder / "state",
            out=self.out,
            device="cpu",
            reconnect_timeout=30.0,
            **self.flags,
        )
        client = CoordinatorClient(self.address, None, reconnect_timeout_s=30.0)
        try:
            with ExitStack() as stack, ComputeThread() as worker:
                sites = open_sites(settings, None, stack)
                executor = TaskExecutor(settings, sites, ProcessGroup(0, 1))
                return await SiteLoop(sites[0], client, executor, worker, settings, ProgressDisplay()).run()
        finally:
            await client.close()


@pytest.fixture(scope="module")
def manifest(model: Path) -> AdapterManifest:
    """The adapter of the run on the tiny model."""
    from fedhds_client.models.adapter import AdapterModel
    from fedhds_client.models.loading import load_base_model

    spec = RunSpec.of(model=str(model), rounds=1, lora_rank=2)
    return AdapterModel(load_base_model(str(model), device="cpu"), spec).manifest()


@pytest.fixture
async def world(tmp_path: Path, model: Path, manifest: AdapterManifest) -> AsyncIterator[World]:
    write_rows(tmp_path / "rows.jsonl", {"bees": 8})
    spec = RunSpec.of(model=str(model), rounds=1, lora_rank=2, max_length=64, max_new_tokens=2)
    (tmp_path / "coordinator").mkdir()
    coordinator = Coordinator(spec.model_dump_json(), manifest, tmp_path / "coordinator")
    server = grpc.aio.server()
    rpc.add_FederationServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield World(tmp_path, model, coordinator, f"127.0.0.1:{port}")
    await server.stop(None)


async def test_an_honest_coordinator_is_served(world: World, manifest: AdapterManifest) -> None:
    world.coordinator.tasks = [world.coordinator.evaluate(world.coordinator.adapters[0])]
    assert await world.live()
    assert len(world.coordinator.requests("CompleteTask")) == 1
    assert (world.out / "adapter_config.json").read_text() == manifest.config
    assert (world.out / "README.md").read_text() == CARD
    assert Artifact.of_file(world.out / "adapter_model.safetensors") == world.coordinator.adapters[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"session": "s" * 201}, "session"),
        ({"session": ""}, "session"),
        ({"run_id": EVIL}, "run_id"),
        ({"heartbeat_timeout_s": float("nan")}, "heartbeat_timeout_s"),
        ({"spec": " " * (1 << 20)}, "the run's specification has 1048576 characters"),
        ({"spec": "[" * (1 << 17)}, "cannot read the run's specification"),
    ],
)
async def test_an_enrollment_that_is_none_ends_the_site(world: World, answer: dict[str, Any], reason: str) -> None:
    world.coordinator.enrollment = answer
    with pytest.raises(errors.EnrollmentRefused, match=reason):
        await world.live()
    assert not world.coordinator.requests("Register")


@pytest.mark.parametrize(
    "absurd",
    [
        {"evaluation": {"max_new_tokens": 10**9}},
        {"rounds": {"count": 10**9}},
        {"peft": {"method": "lora", "rank": 10**6}},
        {"peft": {"method": "lora", "targets": [f"m{number}" for number in range(1000)]}},
        {"training": {"batch_size": 10**9}},
        {"training": {"local_epochs": 10**9}},
        {"model": {"name": "m", "max_length": 10**9}},
        {"model": {"name": "m" * 10_000}},
        {"model": {"name": "m", "license": "l" * 10_000}},
        {"selection": {"features": {"dimension": 10**6}}},
        {"selection": {"features": {"layers": "1," * 10_000 + "1"}}},
    ],
    ids=str,
)
async def test_a_specification_that_would_exhaust_the_site_is_refused(world: World, absurd: dict[str, Any]) -> None:
    ((part, values),) = absurd.items()
    world.coordinator.spec = json.dumps(json.loads(world.coordinator.spec) | {part: values})
    with pytest.raises(errors.EnrollmentRefused, match="cannot read the run's specification") as caught:
        await world.live()
    assert len(str(caught.value)) < 1000
    assert [name for name, _ in world.coordinator.calls] == ["Enroll"]


async def test_a_feature_model_is_loaded_only_if_the_site_allows_it(world: World, model: Path) -> None:
    # Another path to the same files will do: the policy goes by the name.
    other = world.folder / "other"
    other.symlink_to(model)
    world.respecified(feature_model=str(other))
    with pytest.raises(errors.PolicyError, match=f"--allow-feature-model {other}"):
        await world.live()
    assert not world.coordinator.requests("Register")
    world.flags = {"allow_feature_model": (str(other),)}
    assert await world.live()


async def test_an_adapter_of_another_size_is_not_fetched(world: World) -> None:
    task = world.coordinator.evaluate(Artifact("0" * 64, 1 << 60))
    world.coordinator.tasks = [task]
    assert not await world.live()
    (failure,) = world.coordinator.requests("FailTask")
    assert (failure.task_id, failure.kind) == (task.id, "AdapterError")
    assert [request.artifact.digest for request in world.coordinator.requests("Download")] == [
        world.coordinator.adapters[0].digest
    ]


async def test_a_download_ends_at_its_announced_size(world: World) -> None:
    world.coordinator.extra = bytes(64 << 20)
    with pytest.raises(errors.ArtifactError, match="sends more than the"):
        await world.live()
    assert world.adapters == []
    assert not world.out.joinpath("adapter_model.safetensors").exists()


async def test_other_tensors_and_values_are_refused(world: World, manifest: AdapterManifest) -> None:
    coordinator = world.coordinator
    turned = tuple(replace(tensor, shape=tensor.shape[::-1]) for tensor in manifest.tensors)
    bad = [coordinator.adapter(float("nan")), coordinator.adapter(0.5, AdapterManifest(turned, manifest.config))]
    coordinator.tasks = [coordinator.evaluate(artifact, number) for number, artifact in enumerate(bad, 1)]
    assert not await world.live()
    assert [failure.kind for failure in coordinator.requests("FailTask")] == ["AdapterError"] * 2
    assert world.adapters == [coordinator.adapters[0].digest]
    coordinator.done = {"adapter": bad[0].to_proto()}
    with pytest.raises(errors.AdapterError, match="not finite"):
        await world.live()
    assert Artifact.of_file(world.out / "adapter_model.safetensors") == coordinator.adapters[0]


async def test_the_final_folder_is_of_the_site_s_own_making(world: World, manifest: AdapterManifest) -> None:
    world.coordinator.done = {
        "adapter_config": '{"peft_type": "LORA", "auto_mapping": {"parent_library": "os"}}',
        "model_card": f"{CARD}<script>{EVIL}" + "x" * (1 << 20),
    }
    assert await world.live()
    assert (world.out / "adapter_config.json").read_text() == manifest.config
    card = (world.out / "README.md").read_text()
    assert card.startswith(f"{CARD}&lt;script>evil [2J text\n")
    assert len(card) < (1 << 18) + 100
    assert not set("\x1b\u202e<") & set(card)


async def test_texts_are_printable_and_short_before_they_are_logged(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = logging.getLogger().handlers
    configure_logging("INFO")
    world.coordinator.waits = [EVIL + "x" * 100_000]
    world.coordinator.done = {"message": EVIL}
    assert await world.live()
    logging.getLogger().handlers = handlers
    text = capsys.readouterr().err
    assert not set("\x1b\u202e") & set(text)
    assert "ward: evil [2J text 12:00:00 INFO forged" in text
    assert "the run completed: evil [2J text 12:00:00 INFO forged" in text
    assert max(map(len, text.splitlines())) < 700


async def test_a_run_that_ends_as_no_run_does_is_an_error(world: World) -> None:
    world.coordinator.done = {"outcome": EVIL}
    with pytest.raises(errors.FedhdsError, match=r"which fedhds .* does not know"):
        await world.live()


async def test_a_coordinator_that_holds_no_call_does_not_keep_the_site_busy(world: World) -> None:
    world.coordinator.waits = [""] * 5
    assert await world.live()
    assert len(world.coordinator.requests("NextTask")) == 6


async def test_old_adapters_leave_the_disk(world: World) -> None:
    coordinator = world.coordinator
    coordinator.adapters = [coordinator.adapter(value) for value in (0.01, 0.02, 0.03)]
    coordinator.tasks = [coordinator.evaluate(artifact, number) for number, artifact in enumerate(coordinator.adapters)]
    assert await world.live()
    assert len(coordinator.requests("CompleteTask")) == 3
    assert world.adapters == [coordinator.adapters[-1].digest]


async def test_a_refusal_does_not_tell_what_the_ledger_has(world: World) -> None:
    world.respecified(
        selection_strategy="fedhds-aligned",
        reduction="pca",
        selection_clip_norm=1.0,
        selection_noise_multiplier=2.0,
        selection_budget="4",
    )
    world.flags = {"selection_max_epsilon": 6.0}
    world.coordinator.tasks = [
        pb.Task(id=f"select/{number}/ward", kind="select", adapter=world.coordinator.adapters[0].to_proto())
        for number in range(20)
    ]
    assert await world.live()
    failures = world.coordinator.requests("FailTask")
    assert 0 < len(failures) < 20
    for failure in failures:
        assert failure.kind == "PrivacyError"
        assert failure.reason == "this release would go beyond the site's own --selection-max-epsilon"
