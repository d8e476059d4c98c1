"""First values that follow from the base model (DoRA): a site sends them once, and their digest says which they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedhds.errors import AdapterError, EnrollmentRefused, TaskError
from fedhds.fingerprint import combined
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, Initial, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    Discard,
    DrawAdapter,
    Instruction,
    ModelConfirmed,
    SiteConnected,
    SiteRegistered,
)
from tests.support.host import FINGERPRINT, MANIFEST, Host, refused, send, start, task_of, written
from tests.support.machine import artifact, doing, machine, work

LENGTHS = np.array([0.5, 1.5, 2.5, 3.5], dtype=np.float32)
LENGTH = TensorSpec("q.lora_magnitude_vector", (4,), "lora_magnitude_vector", Initial.base(LENGTHS), None)
DORA = AdapterManifest((*MANIFEST.tensors, LENGTH), '{"r": 2, "use_dora": true}')


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    """A run of DoRA that one site begins."""
    host = await start(tmp_path, use_dora=True)
    yield host
    await host.stop()


async def session_of(host: Host, name: str) -> str:
    return str((await host.federation.Enroll(pb.EnrollRequest(site=name, protocol_versions=[2]))).session)


def registration(session: str, manifest: AdapterManifest = DORA, sent: Artifact | None = None) -> pb.RegisterRequest:
    request = pb.RegisterRequest(session=session, fingerprint=FINGERPRINT, manifest=manifest.to_proto(), rows=10)
    if sent is not None:
        request.first_values.CopyFrom(sent.to_proto())
    return request


def file_of(folder: Path, values: FloatArray = LENGTHS) -> tuple[bytes, Artifact]:
    made = write_adapter(folder / "first", DORA.from_base, lambda _: values, "float32")
    return (folder / "first").read_bytes(), made


async def test_a_site_is_asked_for_them_until_somebody_has_sent_them(host: Host) -> None:
    content, made = file_of(host.folder)
    first, second = await session_of(host, "a"), await session_of(host, "b")
    # The first registers, and does not send anything.
    assert (await host.federation.Register(registration(first))).first_values_needed
    assert host.coordinator.state.adapters == {}
    # Named and not uploaded, they are still needed.
    assert (await host.federation.Register(registration(second, sent=made))).first_values_needed
    await send(host, second, content, made)
    assert not (await host.federation.Register(registration(second, sent=made))).first_values_needed
    await task_of(host, first)
    with AdapterReader(host.artifacts.verified(host.coordinator.state.adapters[0]), DORA) as reader:
        assert np.array_equal(reader.tensor(LENGTH), LENGTHS)
        drawn = DORA.tensors[0]
        assert np.array_equal(reader.tensor(drawn), drawn.initial_value(host.coordinator.state.spec.seed))
    # From then on nobody is asked, and nothing more is taken.
    third = await session_of(host, "c")
    assert not (await host.federation.Register(registration(third))).first_values_needed
    assert isinstance(await refused(send(host, third, content, made)), TaskError)


@pytest.mark.parametrize("values", [LENGTHS * 2, LENGTHS * np.float32("nan")])
async def test_other_values_than_the_digest_says_are_refused(host: Host, values: FloatArray) -> None:
    content, made = file_of(host.folder, values)
    session = await session_of(host, "a")
    assert (await host.federation.Register(registration(session))).first_values_needed
    await send(host, session, content, made)
    error = await refused(host.federation.Register(registration(session, sent=made)))
    assert isinstance(error, AdapterError)
    assert "q.lora_magnitude_vector" in str(error)
    assert host.coordinator.state.first_values is None


async def test_values_that_no_adapter_can_have_are_refused_whatever_the_digest(host: Host) -> None:
    values = np.array([1, np.inf, 1, 1], dtype=np.float32)
    manifest = replace(DORA, tensors=(*MANIFEST.tensors, replace(LENGTH, initial=Initial.base(values))))
    content, made = file_of(host.folder, values)
    session = await session_of(host, "a")
    await host.federation.Register(registration(session, manifest))
    await send(host, session, content, made)
    assert isinstance(await refused(host.federation.Register(registration(session, manifest, made))), AdapterError)


async def test_another_artifact_of_the_store_is_not_taken_for_them(host: Host) -> None:
    path, other = written(host, 0.5)
    host.artifacts.adopt(path, other)
    session = await session_of(host, "a")
    await host.federation.Register(registration(session))
    assert isinstance(await refused(host.federation.Register(registration(session, sent=other))), AdapterError)


async def test_a_site_with_other_values_has_another_adapter(host: Host) -> None:
    await host.federation.Register(registration(await session_of(host, "a")))
    other = replace(DORA, tensors=(*MANIFEST.tensors, replace(LENGTH, initial=Initial.base(LENGTHS * 2))))
    error = await refused(host.federation.Register(registration(await session_of(host, "b"), other)))
    assert isinstance(error, EnrollmentRefused)


async def test_a_coordinator_that_starts_again_still_has_or_still_needs_them(tmp_path: Path) -> None:
    first = await start(tmp_path, use_dora=True)
    content, made = file_of(tmp_path)
    session = await session_of(first, "a")
    assert (await first.federation.Register(registration(session))).first_values_needed
    await first.stop()
    second = await start(tmp_path)
    assert second.coordinator.state.adapters == {}
    await send(second, session, content, made)
    assert not (await second.federation.Register(registration(session, sent=made))).first_values_needed
    await second.stop()
    third = await start(tmp_path)
    assert third.coordinator.state.first_values == made
    assert (await task_of(third, session)).task.kind == "train"
    await third.stop()


# The state machine.


def register(run: RunMachine, site: str, sent: Artifact | None = None) -> list[Instruction]:
    run.handle(SiteConnected(site, "", f"s{site}"))
    fingerprint = {part: getattr(FINGERPRINT, part) for part in ("weights", "config", "tokenizer", "template")}
    return work(run.handle(SiteRegistered(1.0, site, 10, False, fingerprint, DORA, first_values=sent)))


def test_the_adapter_is_drawn_once_they_are_here() -> None:
    run = machine(min_sites=1)
    assert register(run, "a") == []
    assert run.pending() == []
    assert doing(run) == "enrolling"
    assert register(run, "b", artifact(5)) == [DrawAdapter()]
    assert run.pending() == [DrawAdapter()]
    assert run.state.artifacts == {artifact(5)}
    # Others change nothing.
    assert register(run, "c", artifact(6)) == []
    assert run.state.first_values == artifact(5)
    run.handle(AdapterDrawn(2.0, artifact(1)))
    assert doing(run) != "enrolling"


def test_the_first_site_may_have_sent_them_already() -> None:
    run = machine(min_sites=1)
    assert register(run, "a", artifact(5)) == [DrawAdapter()]


def test_they_go_with_the_base_model_that_they_follow_from() -> None:
    run = machine(min_sites=2)
    register(run, "a", artifact(5))
    run.handle(AdapterDrawn(2.0, artifact(1)))
    told = work(run.handle(ModelConfirmed(3.0, combined({"weights": "f" * 64}), "it is another")))
    assert told == [Discard(artifact(1)), Discard(artifact(5))]
    assert (run.state.first_values, run.state.adapters) == (None, {})
