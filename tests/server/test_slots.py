"""The server optimizer's memory over a whole run: durable, reread after a restart, and deleted when it is outdated."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.tensors.safetensors import AdapterReader
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.aggregation.weights import weight_counts
from fedhds_server.optimizers import OPTIMIZERS
from tests.support.host import MANIFEST, Host, complete, complete_with, enroll, send, start, task_of, written

A, B = MANIFEST.tensors


def value(host: Host, artifact: Artifact, tensor: int = 1) -> float:
    """The one value that a tensor of an artifact holds everywhere; B starts as zeros."""
    with AdapterReader(host.artifacts.verified(artifact), MANIFEST) as reader:
        (only,) = np.unique(reader.tensor(MANIFEST.tensors[tensor])).tolist()
    return float(only)


async def train(host: Host, session: str, number: int, update: float, manifest: AdapterManifest = MANIFEST) -> None:
    """Takes part in one round with an update that holds one value everywhere."""
    task = (await task_of(host, session)).task
    assert task.id == f"train/{number}/a"
    path, artifact = written(host, update, manifest)
    await send(host, session, path.read_bytes(), artifact)
    assert (await complete(host, session, task.id, artifact)).accepted
    async with asyncio.timeout(20):
        while number not in host.coordinator.state.adapters:  # noqa: ASYNC110 - what it waits for is plain state
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("restarted", [False, True])
async def test_momentum_goes_on_over_rounds_and_restarts(tmp_path: Path, restarted: bool) -> None:
    host = await start(tmp_path, rounds=4, server_optimizer="momentum", server_momentum=0.5)
    session = await enroll(host)
    expected, moved = 0.0, 0.0
    outdated: list[Artifact] = []
    for number, update in enumerate((1.0, 4.0, -2.0, 8.0), start=1):
        await train(host, session, number, update)
        moved = 0.5 * moved + (update - expected)
        expected += moved
        slot = host.coordinator.state.slots["momentum"]
        assert (value(host, host.coordinator.state.adapters[number]), value(host, slot)) == (expected, moved)
        assert slot in host.coordinator.state.artifacts
        await host.coordinator.effects.done()
        # A rollback leads to the last one, and no further.
        kept = [old for old in outdated if host.artifacts.has(old)]
        assert kept == (outdated[-1:] if number < 4 else [])
        outdated.append(slot)
        if restarted and number < 4:
            await host.stop()
            host = await start(tmp_path)
            assert host.coordinator.state.slots == {"momentum": slot}
    assert (await task_of(host, session)).done.outcome == "completed"
    await host.stop()


@pytest.mark.parametrize("optimizer", ["adagrad", "yogi", "adam"])
async def test_a_restart_changes_no_byte_of_adaptive_optimizers(tmp_path: Path, optimizer: str) -> None:
    results = []
    for restarted in (False, True):
        (tmp_path / str(restarted)).mkdir()
        host = await start(tmp_path / str(restarted), rounds=3, server_optimizer=optimizer)
        session = await enroll(host)
        for number, update in enumerate((1.0, 4.0, -2.0), start=1):
            await train(host, session, number, update)
            if restarted and number < 3:
                await host.stop()
                host = await start(tmp_path / str(restarted))
        results.append((host.coordinator.state.adapter, host.coordinator.state.slots))
        await host.stop()
    assert results[0] == results[1]
    assert results[0][1].keys() == set(OPTIMIZERS[optimizer].slots)


async def test_a_round_in_which_nobody_has_rows_leaves_adapter_and_slots(tmp_path: Path) -> None:
    host = await start(tmp_path, rounds=3, server_optimizer="momentum", evaluate_every=1)
    session = await enroll(host)
    await train(host, session, 1, 1.0)
    before = host.coordinator.state.model_copy(deep=True)
    assert (await complete_with(host, session, "train/2/a", pb.TrainResult())).accepted
    assert (await task_of(host, session)).task.id == "train/3/a"
    state = host.coordinator.state
    assert (state.adapters[2], state.slots) == (before.adapters[1], before.slots)
    assert value(host, state.slots["momentum"]) == 1.0
    await host.stop()


async def test_sites_hear_which_roles_train_and_send_these_alone(tmp_path: Path) -> None:
    host = await start(tmp_path, rounds=2, aggregator="alternating")
    session = await enroll(host)
    for number, role in ((1, "lora_B"), (2, "lora_A")):
        request = pb.TrainRequest()
        assert (await task_of(host, session)).task.request.Unpack(request)
        assert list(request.trainable_roles) == [role]
        await train(host, session, number, float(number), MANIFEST.only(frozenset({role})))
    with AdapterReader(host.artifacts.verified(host.coordinator.state.adapter), MANIFEST) as reader:
        assert (reader.tensor(B) == 1.0).all()
        assert (reader.tensor(A) == 2.0).all()
    await host.stop()


async def test_an_update_with_what_does_not_train_is_rejected(tmp_path: Path) -> None:
    host = await start(tmp_path, aggregator="ffa")
    session = await enroll(host)
    task = (await task_of(host, session)).task
    path, artifact = written(host, 9.0)
    await send(host, session, path.read_bytes(), artifact)
    answer = await complete(host, session, task.id, artifact)
    assert not answer.accepted
    assert "1 of them; the first is 'q.lora_A.weight'" in answer.reason
    await host.stop()


@pytest.mark.parametrize(("weight_by", "mean"), [("rows", 3.0), ("tokens", 1.0), ("equal", 2.0)])
async def test_updates_count_by_rows_by_tokens_or_equally(tmp_path: Path, weight_by: str, mean: float) -> None:
    host = await start(tmp_path, min_sites=2, weight_by=weight_by, max_weight_share=1.0, update_norm_factor=0.0)
    sessions = {site: await enroll(host, site, rows=rows) for site, rows in (("a", 1), ("b", 3))}
    for (site, session), update, samples in zip(sessions.items(), (0.0, 4.0), (1, 3), strict=True):
        task = (await task_of(host, session)).task
        path, artifact = written(host, update)
        await send(host, session, path.read_bytes(), artifact)
        tokens = {"a": 30, "b": 10}[site]
        result = pb.TrainResult(update=artifact.to_proto(), samples=samples, response_tokens=tokens)
        assert (await complete_with(host, session, task.id, result)).accepted, site
    assert (await task_of(host, sessions["a"])).done.outcome == "completed"
    assert value(host, host.coordinator.state.adapter) == mean
    await host.stop()


async def test_more_tokens_than_rows_can_have_are_rejected(tmp_path: Path) -> None:
    host = await start(tmp_path, weight_by="tokens", max_length=16)
    session = await enroll(host, rows=4)
    task = (await task_of(host, session)).task
    path, artifact = written(host, 1.0)
    await send(host, session, path.read_bytes(), artifact)
    result = pb.TrainResult(update=artifact.to_proto(), samples=2, response_tokens=33)
    answer = await complete_with(host, session, task.id, result)
    assert answer.rejected
    assert "claims 33 tokens; its rows hold 32 at most" in answer.reason
    await host.stop()


def test_sites_that_keep_their_tokens_count_as_the_others_do() -> None:
    said = {"a": pb.TrainResult(samples=2, response_tokens=30), "b": pb.TrainResult(samples=4, response_tokens=0)}
    kept = {"c": pb.TrainResult(samples=3)}
    assert weight_counts(said | kept, "tokens") == {"a": 30, "b": 0, "c": 15}
    assert weight_counts(kept, "tokens") == {"c": 3}


@pytest.mark.parametrize("settings", [{"dp_noise_multiplier": 1.0}, {"secure_aggregation": True}])
def test_tokens_are_no_weight_where_rows_are_protected(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="weight_by: the number of response tokens is an exact release"):
        RunSpec.of(model="m", rounds=1, weight_by="tokens", selection_strategy="full", **settings)


async def test_values_that_the_runs_type_does_not_hold_are_rejected(tmp_path: Path) -> None:
    host = await start(tmp_path, wire_dtype="float16")
    session = await enroll(host)
    task = (await task_of(host, session)).task
    # A file may be float32 where float16 travels.
    path, artifact = written(host, 70_000.0)
    await send(host, session, path.read_bytes(), artifact)
    answer = await complete(host, session, task.id, artifact)
    assert not answer.accepted
    assert "q.lora_A.weight holds values beyond 65504, the largest of the run's float16" in answer.reason
    await host.stop()
