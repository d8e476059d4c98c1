"""The bound on updates by default: what is usual, what is shortened, and that no one site decides on the adapter."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhds.errors import RequestError, RunOver
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.v2 import status_pb2
from fedhds_server.aggregation.norms import bounded, update_norm
from fedhds_server.run.state import Phase
from fedhds_server.status import status_of
from tests.support.host import MANIFEST, Host, complete, enroll, refused, send, start, task_of, written
from tests.support.manifests import lora_manifest


def test_the_norm_is_that_of_the_difference_over_the_tensors_that_train(tmp_path: Path) -> None:
    manifest = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
    random = np.random.default_rng(1)
    values = [{spec: random.normal(size=spec.shape).astype(np.float32) for spec in manifest.tensors} for _ in range(2)]
    for name, tensors in zip(("current", "update"), values, strict=True):
        write_adapter(tmp_path / name, manifest, tensors.__getitem__, "float32")
    half = manifest.only(frozenset({"lora_B"}))
    write_adapter(tmp_path / "half", half, values[1].__getitem__, "float32")
    squares = [float(np.square(np.float64(values[1][spec]) - values[0][spec]).sum()) for spec in manifest.tensors]
    whole = update_norm(tmp_path / "update", tmp_path / "current", manifest, manifest.roles)
    assert whole == pytest.approx(sum(squares) ** 0.5)
    part = update_norm(tmp_path / "half", tmp_path / "current", manifest, frozenset({"lora_B"}))
    assert part == pytest.approx(squares[1] ** 0.5)


def test_updates_beyond_the_bound_are_shortened_to_it_and_absurd_ones_left_out() -> None:
    norms = {"a": 1.0, "b": 1.2, "c": 0.9, "d": 30.0, "e": 1e30}
    result = bounded(norms, [], 5, leave_out=True)
    # The median is 1.2.
    assert result.scales == {"a": 1, "b": 1, "c": 1, "d": 6 / 30, "e": 6e-30}
    assert result.left_out == {
        "e": "its norm is 1e+30, 8.33e+29 times the median of recent updates; --update-norm-factor is 5"
    }
    assert result.notes == [
        "the update of site d counts in part: its norm is 30, 25 times the median of recent updates, "
        "--update-norm-factor 5"
    ]
    # A rule that counts parties must see them all.
    every = bounded(norms, [], 5, leave_out=False)
    assert (every.scales, every.left_out) == (result.scales, {})
    off = bounded(norms, [], 0, leave_out=True)
    assert (set(off.scales.values()), off.left_out) == ({1.0}, {})


def test_the_median_is_over_parties_and_recent_rounds() -> None:
    # Ten sites of one party are one vote.
    many = {f"evil/{number}": 1e6 for number in range(10)} | {"a": 1.0, "b": 1.0}
    assert set(bounded(many, [], 5, leave_out=True).left_out) == {f"evil/{number}" for number in range(10)}
    # Norms of 0 say nothing of what is usual.
    assert bounded({"a": 0.0, "b": 0.0, "c": 1.0}, [], 5, leave_out=True).scales == {"a": 1, "b": 1, "c": 1}
    # One site alone is compared with its own past.
    past = [{"a": 1.0}, {"a": 1.1}]
    assert bounded({"a": 11.0}, past, 5, leave_out=True).scales["a"] == pytest.approx(5 * 1.1 / 11)
    # What most updates of a round are like is shortened at most, or a run whose norms have grown would stand still.
    grown = bounded({"a": 1000.0, "b": 900.0}, [{"a": 1.0, "b": 1.1}] * 5, 5, leave_out=True)
    assert grown.left_out == {}
    assert max(grown.scales.values()) < 0.01


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.just(0.0) | st.floats(1e-9, 1e39), min_size=1), st.floats(0.5, 20)
)
def test_no_update_counts_with_more_than_the_bound(norms: dict[str, float], factor: float) -> None:
    result = bounded(norms, [], factor, leave_out=True)
    counted = sorted(norms[site] for site in norms if norms[site] > 0)
    usual = statistics.median(counted or [0])
    assert result.scales.keys() == norms.keys()
    for site, norm in norms.items():
        assert norm * result.scales[site] <= factor * usual * (1 + 1e-9)
        assert result.scales[site] == 1 or norm > factor * usual
    assert len(result.left_out) < len(norms)


# In a coordinator.


async def delivered(host: Host, sessions: dict[str, str], values: dict[str, float]) -> None:
    """A round in which each site's update holds one value everywhere."""
    for name, value in values.items():
        task = (await task_of(host, sessions[name])).task
        path, artifact = written(host, value)
        await send(host, sessions[name], path.read_bytes(), artifact)
        assert (await complete(host, sessions[name], task.id, artifact)).accepted
    await host.coordinator.effects.done()


def largest(host: Host) -> float:
    with AdapterReader(host.artifacts.verified(host.coordinator.state.adapter), MANIFEST) as reader:
        return max(float(np.abs(reader.tensor(spec)).max()) for spec in MANIFEST.tensors)


@pytest.mark.parametrize("absurd", [1e30, 1e4])
async def test_a_site_with_absurd_weights_neither_fails_the_run_nor_blames_honest_sites(
    tmp_path: Path, absurd: float, caplog: pytest.LogCaptureFixture
) -> None:
    host = await start(tmp_path, min_sites=4, rounds=3)
    sessions = {name: await enroll(host, name) for name in "abcd"}
    for number in (1, 2, 3):
        await delivered(host, sessions, {"a": 0.9 * number, "b": number, "c": 1.1 * number, "d": absurd})
        assert largest(host) < 4
        if number == 1:
            await host.stop()
            host = await start(tmp_path)
    state = host.coordinator.state
    assert all(closed.contributions == {"a": 10, "b": 10, "c": 10} for closed in state.closed_rounds)
    assert all(closed.updates.keys() == set("abc") for closed in state.closed_rounds)
    assert "round 1 goes on without the update of site d: its norm is" in caplog.text
    assert {name: (site.rejections, site.quarantined, site.last_error[:11]) for name, site in state.sites.items()} == {
        **dict.fromkeys("abc", (0, False, "")),
        "d": (0, False, "its norm is"),
    }
    assert (await task_of(host, sessions["a"])).done.outcome == "completed"
    await host.stop()


async def test_scores_and_the_gap_are_in_the_status_and_a_site_sees_its_own(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=4, rounds=2)
    sessions = {name: await enroll(host, name) for name in "abcd"}
    await delivered(host, sessions, {"a": 0.9, "b": 1.0, "c": 1.1, "d": -1.5})
    status = status_of(host.coordinator.state, tmp_path)
    (closed,) = status.closed_rounds
    assert closed.product_gap > 0.01
    assert set(closed.updates) == set("abcd")
    distances = {name: score.distance for name, score in closed.updates.items()}
    assert max(distances, key=distances.__getitem__) == "d"
    assert {site.site: site.last_update.distance for site in status.sites} == distances
    assert closed.updates["a"].norm > 0
    # The dashboard gets the last score of a site, and no list by round.
    short = status_of(host.coordinator.state, tmp_path, limit=2)
    assert not short.closed_rounds[0].updates
    assert all(site.HasField("last_update") for site in short.sites)
    await host.stop()


async def test_an_operator_takes_the_run_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = await start(tmp_path, min_sites=1, rounds=6, server_optimizer="momentum")
    sessions = {"a": await enroll(host, "a")}
    with pytest.raises(RunOver, match="nothing to go back from"):
        raise await refused(host.operations.Rollback(status_pb2.RollbackRequest(reason="odd")))
    states = []
    for number in (1, 2, 3):
        await delivered(host, sessions, {"a": float(number)})
        states.append((host.coordinator.state.adapter, host.coordinator.state.slots))
    assert len({adapter.digest for adapter, _ in states}) == 3
    error = await refused(host.operations.Rollback(status_pb2.RollbackRequest(reason="odd", round_number=9)))
    assert isinstance(error, RequestError)
    answer = await host.operations.Rollback(status_pb2.RollbackRequest(reason="odd"))
    assert answer.round_number == 2
    await host.stop()
    assert "the run is taken back to round 2: odd" in caplog.text
    # It is durable, with the optimizer's memory and all files that go with it.
    host = await start(tmp_path)
    state = host.coordinator.state
    assert (state.adapter, state.slots) == states[1]
    assert (state.phase, state.round_number) == (Phase.RUNNING, 5)
    for artifact in state.artifacts:
        host.artifacts.verified(artifact)
    await delivered(host, sessions, {"a": 1.0})
    assert [closed.unchanged != "" for closed in state.closed_rounds] == [False, False, False, True, False]
    await host.stop()


def test_of_two_updates_the_longer_one_is_not_shortened_but_an_absurd_one_is_left_out() -> None:
    for high in (2.0, 20.0, 49.0):
        result = bounded({"a": 1.0, "b": high}, [], 5, leave_out=True)
        assert (set(result.scales.values()), result.left_out) == ({1.0}, {})
    assert set(bounded({"a": 1.0, "b": 51.0}, [], 5, leave_out=True).left_out) == {"b"}
