"""Coresets and the reports that they refer to: right rows, durable, within the site's budget, the same on a retry."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhds.errors import PrivacyError, StorageError, TaskError
from fedhds.privacy import ledger as ledger_module
from fedhds.privacy.ledger import Ledger, Limit
from fedhds.privacy.mechanisms import calibrate_noise
from fedhds.spec import RunSpec
from fedhds.v2 import selection_pb2
from fedhds_client.features.extraction import Features
from fedhds_client.selection import STRATEGIES, SelectionContext
from fedhds_client.selection.coreset import coreset_rows, save_clusters
from fedhds_client.selection.private_reporter import PrivateReporter
from fedhds_client.state_files import MAX_RUNS

MEMBERS = [[4, 0, 9], [2, 7], []]
TASK = "select/0/ward"


def picks(*pairs: tuple[int, int], task_id: str = TASK) -> selection_pb2.Coreset:
    clusters = [selection_pb2.ClusterPick(cluster_id=cluster, count=count) for cluster, count in pairs]
    return selection_pb2.Coreset(picks=selection_pb2.ClusterPicks(select_task_id=task_id, clusters=clusters))


def test_all_rows(tmp_path: Path) -> None:
    coreset = selection_pb2.Coreset(all=selection_pb2.AllRows())
    assert coreset_rows(coreset, rows=4, run_id="r", folder=tmp_path) == (0, 1, 2, 3)
    assert coreset_rows(coreset, rows=0, run_id="r", folder=tmp_path) == ()


@given(st.integers(0, 50), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_random_draw_is_of_distinct_rows_of_the_shard(rows: int, count: int, seed: int) -> None:
    coreset = selection_pb2.Coreset(random=selection_pb2.RandomRows(count=count, seed=seed))
    drawn = coreset_rows(coreset, rows=rows, run_id="r", folder=Path())
    assert len(drawn) == min(count, rows)
    assert list(drawn) == sorted(set(drawn))
    assert set(drawn) <= set(range(rows))
    assert coreset_rows(coreset, rows=rows, run_id="r", folder=Path()) == drawn


def test_a_random_draw_is_uniform_and_depends_on_the_seed() -> None:
    counts = np.zeros(10)
    for seed in range(3000):
        drawn = selection_pb2.Coreset(random=selection_pb2.RandomRows(count=3, seed=seed))
        counts[list(coreset_rows(drawn, rows=10, run_id="r", folder=Path()))] += 1
    assert counts.sum() == 9000
    assert abs(counts / 3000 - 0.3).max() < 0.05


@pytest.mark.parametrize(
    ("pairs", "rows"),
    [
        ([(0, 1)], (4,)),
        ([(1, 1), (0, 2)], (0, 2, 4)),
        ([(0, 99)], (0, 4, 9)),
        ([(0, 1), (0, 2)], (0, 4)),
        ([(2, 1)], ()),
        ([(1, 0)], ()),
        ([], ()),
    ],
)
def test_picks_take_the_nearest_rows_there_are(
    tmp_path: Path, pairs: list[tuple[int, int]], rows: tuple[int, ...]
) -> None:
    save_clusters(tmp_path, "r", TASK, MEMBERS, rows=10)
    assert coreset_rows(picks(*pairs), rows=10, run_id="r", folder=tmp_path) == rows


@pytest.mark.parametrize(
    ("coreset", "rows", "run_id", "said"),
    [
        (picks((3, 1)), 10, "r", "none has number 3"),
        (picks((0, 1), task_id="select/1/ward"), 10, "r", "reported no clusters"),
        (picks((0, 1), task_id="../../etc/passwd"), 10, "r", "reported no clusters"),
        (picks((0, 1)), 10, "another run", "reported no clusters"),
        (picks((0, 1)), 9, "r", "had 10"),
        (selection_pb2.Coreset(), 10, "r", "does not know"),
    ],
)
def test_what_was_never_reported_cannot_be_picked(
    tmp_path: Path, coreset: selection_pb2.Coreset, rows: int, run_id: str, said: str
) -> None:
    save_clusters(tmp_path, "r", TASK, MEMBERS, rows=10)
    with pytest.raises(TaskError, match=said):
        coreset_rows(coreset, rows=rows, run_id=run_id, folder=tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 1}'])
def test_damaged_clusters_are_an_error(tmp_path: Path, content: str) -> None:
    save_clusters(tmp_path, "r", TASK, MEMBERS, rows=10)
    next((tmp_path / "clusters").rglob("*.json")).write_text(content)
    with pytest.raises(StorageError, match="damaged"):
        coreset_rows(picks((0, 1)), rows=10, run_id="r", folder=tmp_path)


def test_clusters_are_the_owners_alone_and_replace_each_other_whole(tmp_path: Path) -> None:
    save_clusters(tmp_path, "r", TASK, [[1]], rows=10)
    save_clusters(tmp_path, "r", TASK, MEMBERS, rows=10)
    (file,) = (tmp_path / "clusters").rglob("*.json")
    assert os.stat(file).st_mode & 0o777 == 0o600
    assert coreset_rows(picks((0, 1)), rows=10, run_id="r", folder=tmp_path) == (4,)


def test_clusters_of_a_run_stay_and_those_of_old_runs_go(tmp_path: Path) -> None:
    tasks = [f"select/{number}/ward" for number in range(30)]
    for run in range(12):
        for task_id in tasks if run == 11 else tasks[:1]:
            save_clusters(tmp_path, f"run {run}", task_id, MEMBERS, rows=10)
        # The clocks of file systems are coarse.
        newest = max((tmp_path / "clusters").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 + run, 1000 + run))
    # Asked once more by a coordinator that was restored, though it selected later.
    for task_id in tasks:
        assert coreset_rows(picks((0, 1), task_id=task_id), rows=10, run_id="run 11", folder=tmp_path) == (4,)
    assert len(list((tmp_path / "clusters").iterdir())) == MAX_RUNS
    with pytest.raises(TaskError, match="reported no clusters"):
        coreset_rows(picks((0, 1)), rows=10, run_id="run 0", folder=tmp_path)


# Reports.

GROUPS, PER_GROUP = 3, 8
ROWS = GROUPS * PER_GROUP


def planted_features() -> Features:
    """Features of planted groups: row i belongs to group i % GROUPS, given in another order than the shard's."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(GROUPS, 64)) * 5
    values = centers[np.arange(ROWS) % GROUPS] + rng.normal(size=(ROWS, 64))
    order = rng.permutation(ROWS)
    return Features(order.astype(np.int64), values[order].astype(np.float32))


def context(
    folder: Path,
    *,
    features: Callable[[], Features] = planted_features,
    max_epsilon: float | None = None,
    task_id: str = TASK,
    min_cluster_rows: int = 5,
    **settings: Any,
) -> SelectionContext:
    spec = RunSpec.of(**{"model": "m", "rounds": 1, "selection_strategy": "fedhds", "reduction": "pca"} | settings)
    account = Ledger(folder / "ledger.db").account("rows", lambda: [b"row"])
    limits = () if max_epsilon is None else (Limit(max_epsilon, 1e-5, "--selection-max-epsilon", selection_only=True),)
    reporter = PrivateReporter("ward", folder, account, "run", spec, limits)
    reporter = replace(reporter, min_cluster_rows=min_cluster_rows)
    return SelectionContext(task_id, spec, ROWS, features, reporter)


def report(at: SelectionContext) -> selection_pb2.ClusterReport:
    made = STRATEGIES[at.spec.selection.strategy.name].report(at)
    assert isinstance(made, selection_pb2.ClusterReport)
    return made


def no_features() -> Features:
    pytest.fail("features were taken")


@pytest.mark.parametrize("reduction", ["tsne", "pca", "none"])
def test_a_picked_row_is_of_the_group_that_won(tmp_path: Path, reduction: str) -> None:
    at = context(tmp_path)
    at = replace(at, spec=at.spec.replace(reduction=reduction, min_cluster_size=4))
    sent = report(at)
    assert [centroid.cluster_id for centroid in sent.centroids] == list(range(GROUPS))
    assert (
        {len(centroid.values) for centroid in sent.centroids} == {64 if reduction == "none" else 2} == {sent.dimension}
    )
    groups = []
    for centroid in sent.centroids:
        rows = coreset_rows(picks((centroid.cluster_id, 99)), rows=ROWS, run_id="run", folder=tmp_path)
        (group,) = {row % GROUPS for row in rows}
        (best,) = coreset_rows(picks((centroid.cluster_id, 1)), rows=ROWS, run_id="run", folder=tmp_path)
        assert best % GROUPS == group
        if reduction == "none":
            features = planted_features()
            value = dict(zip(features.ids.tolist(), features.values, strict=True))
            distance = {row: np.linalg.norm(value[row] - np.array(centroid.values)) for row in rows}
            assert best == min(distance, key=distance.__getitem__)
        groups.append(group)
    assert sorted(groups) == list(range(GROUPS))


def test_a_report_without_noise_is_recorded_as_unprotected(tmp_path: Path) -> None:
    at = context(tmp_path)
    sent = report(at)
    assert (sent.noise_std, sent.clip_norm) == (0, 0)
    (entry,) = at.reporter.account.entries()
    assert (entry.epsilon, entry.noise_multiplier, entry.sensitivity) == (None, 0.0, None)
    assert (entry.released, entry.dimension) == (len(sent.centroids), 2)


def test_clipping_alone_bounds_but_protects_nothing(tmp_path: Path) -> None:
    at = context(tmp_path, selection_clip_norm=0.5)
    sent = report(at)
    norms = [np.linalg.norm(centroid.values) for centroid in sent.centroids]
    assert norms == pytest.approx([0.5] * len(norms))
    assert at.reporter.account.entries()[0].epsilon is None


@pytest.mark.parametrize("released", [1, GROUPS, 9])
def test_a_noised_report_has_the_same_shape_whatever_the_shard(tmp_path: Path, released: int) -> None:
    noise: dict[str, Any] = {"selection_clip_norm": 5.0, "selection_noise_multiplier": 2.0}
    noise["released_centroids"] = released

    def nothing() -> Features:
        return Features(np.zeros(0, dtype=np.int64), np.zeros((0, 64), dtype=np.float32))

    shapes = []
    for number, features in enumerate([planted_features, nothing]):
        at = context(tmp_path, features=features, task_id=f"select/{number}/ward", **noise)
        sent = report(at)
        shapes.append((sent.dimension, [(c.cluster_id, len(c.values)) for c in sent.centroids], sent.noise_std))
        for centroid in sent.centroids:
            rows = coreset_rows(
                picks((centroid.cluster_id, 1), task_id=at.task_id), rows=ROWS, run_id="run", folder=tmp_path
            )
            assert len(rows) == (1 if centroid.cluster_id < GROUPS and not number else 0)
    assert shapes[0] == shapes[1]
    assert shapes[0][2] == pytest.approx(2.0 * 2 * 5 * released**0.5)


def test_a_retry_sends_the_same_bytes_without_work_or_cost_also_after_a_restart(tmp_path: Path) -> None:
    noise: dict[str, Any] = {
        "selection_clip_norm": 5.0,
        "selection_noise_multiplier": calibrate_noise(epsilon=3, delta=1e-5),
        "max_epsilon": 3.1,
    }
    first = report(context(tmp_path, **noise))
    again = context(tmp_path, features=no_features, **noise)
    assert report(again).SerializeToString() == first.SerializeToString()
    assert len(again.reporter.account.entries()) == 1


def test_another_task_draws_again(tmp_path: Path) -> None:
    noise: dict[str, Any] = {"selection_clip_norm": 5.0, "selection_noise_multiplier": 1.0}
    first, second = (report(context(tmp_path, task_id=f"select/{number}/ward", **noise)) for number in (1, 2))
    assert first.SerializeToString() != second.SerializeToString()


def test_a_crash_before_the_entry_leaves_nothing_spent_and_the_task_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    noise: dict[str, Any] = {"selection_clip_norm": 5.0, "selection_noise_multiplier": 1.0}
    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, "register", crash)
        with pytest.raises(KeyboardInterrupt):
            report(context(tmp_path, **noise))
    at = context(tmp_path, **noise)
    assert at.reporter.account.spent(delta=1e-5) == 0
    sent = report(at)
    assert report(context(tmp_path, features=no_features, **noise)) == sent


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_the_sites_own_budget_is_final(tmp_path: Path, multiplier: float) -> None:
    noise: dict[str, Any] = {"selection_clip_norm": 5.0, "selection_noise_multiplier": multiplier}
    with pytest.raises(PrivacyError, match="a larger --selection-max-epsilon"):
        report(context(tmp_path, features=no_features, max_epsilon=3.0, **noise))
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]
    assert not Ledger(tmp_path / "ledger.db").entries()


def test_a_large_delta_does_not_talk_a_site_out_of_its_budget(tmp_path: Path) -> None:
    noise: dict[str, Any] = {"selection_clip_norm": 5.0, "selection_noise_multiplier": 0.5, "selection_delta": 0.99}
    with pytest.raises(PrivacyError):
        report(context(tmp_path, features=no_features, max_epsilon=3.0, **noise))


def test_the_budget_counts_earlier_tasks(tmp_path: Path) -> None:
    one = calibrate_noise(epsilon=2, delta=1e-5)
    options: dict[str, Any] = {"max_epsilon": 4.0, "selection_clip_norm": 1.0, "selection_noise_multiplier": one}
    for number in range(3):
        report(context(tmp_path, task_id=f"select/{number}/ward", **options))
    with pytest.raises(PrivacyError):
        report(context(tmp_path, task_id="select/9/ward", **options))


@pytest.mark.parametrize(("floor", "clusters"), [(1, [0, 1, 2, 3, 0, 0, 0]), (5, [0, 0, 0, 0, 0, 1, 1])])
def test_the_smallest_shards_have_reports_too(tmp_path: Path, floor: int, clusters: list[int]) -> None:
    """Only a site that consents to releases about single rows makes each row a cluster."""
    for rows, count in enumerate(clusters):
        values = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
        features = Features(np.arange(rows), values)
        at = context(tmp_path / str(rows), features=partial(lambda given: given, features), min_cluster_rows=floor)
        (tmp_path / str(rows)).mkdir()
        at = replace(at, spec=at.spec.replace(reduction="tsne"), rows=rows)
        sent = report(at)
        assert len(sent.centroids) == count
        assert sum(centroid.size for centroid in sent.centroids) + sent.unclustered == rows
        assert sent.dimension == 2


@pytest.mark.parametrize("strategy", ["fedhds", "fedhds-aligned"])
@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_no_centroid_is_one_rows_features_unless_the_site_consents(tmp_path: Path, strategy: str, noise: float) -> None:
    """Rows in pairs, which HDBSCAN finds: without the floor a centroid is what two equal rows are."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(30, 16)), 2, axis=0)
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    features = Features(np.arange(len(values)), values)

    def closest(folder: Path, floor: int) -> float:
        folder.mkdir()
        options: dict[str, Any] = {"selection_strategy": strategy, "reduction": "none", "feature_dimension": 16}
        options |= {"selection_noise_multiplier": noise, "selection_clip_norm": float(noise > 0)}
        at = context(folder, features=lambda: features, min_cluster_rows=floor, **options)
        sent = report(replace(at, rows=len(values)))
        centroids = np.array([centroid.values for centroid in sent.centroids]).reshape(-1, 16)
        distances = np.linalg.norm(centroids[:, None] - values[None], axis=2)
        return float(distances.min(initial=math.inf))

    assert closest(tmp_path / "open", 1) < 1e-3
    assert closest(tmp_path / "default", 5) > 0.1
