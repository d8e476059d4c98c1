"""Clusters of a shard: found when they are there, never mispaired with ids, sane for the smallest shards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds_client.features.clustering import NOISE, Clusters, cluster

CENTERS = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def planted(sizes: list[int], seed: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Points around CENTERS, in mixed order, and the center of each."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return CENTERS[labels] + rng.normal(scale=0.3, size=(len(labels), 2)), labels


def check(found: Clusters, ids: npt.NDArray[np.int64], points: npt.NDArray[np.float64]) -> None:
    """What holds for any clusters."""
    point = {int(row): points[place] for place, row in enumerate(ids)}
    assert np.array_equal(found.ids, ids)
    assert found.centroids.shape == (len(found.members), points.shape[1])
    assert np.isfinite(found.centroids).all()
    sizes = [len(members) for members in found.members]
    assert sizes == sorted(sizes, reverse=True)
    everybody = [row for members in found.members for row in members]
    assert len(set(everybody)) == len(everybody)
    assert set(everybody) == set(found.ids[found.labels != NOISE].tolist())
    for number, members in enumerate(found.members):
        assert set(members) == set(found.ids[found.labels == number].tolist())
        distances = [float(np.linalg.norm(point[row] - found.centroids[number])) for row in members]
        assert list(zip(distances, members, strict=True)) == sorted(zip(distances, members, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(8, 20), min_size=2, max_size=3), st.integers(2, 5))
def test_planted_clusters_are_found_with_the_ids_of_their_rows(seed: int, sizes: list[int], smallest: int) -> None:
    points, labels = planted(sizes, seed)
    ids = np.random.default_rng(seed + 1).permutation(10 * len(points))[: len(points)].astype(np.int64)
    found = cluster(ids, points, min_cluster_size=smallest)
    check(found, ids, points)
    group = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    assert {group[members[0]] for members in found.members} == set(range(len(sizes)))
    for members, centroid in zip(found.members, found.centroids, strict=True):
        assert len({group[row] for row in members}) == 1
        assert np.linalg.norm(centroid - CENTERS[group[members[0]]]) < 1.5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    points, _ = planted([12, 15, 9], seed)
    ids = np.arange(len(points))
    order = np.random.default_rng(seed).permutation(len(points))
    found = cluster(ids, points, min_cluster_size=5)
    shuffled = cluster(ids[order], points[order], min_cluster_size=5)
    assert [set(members) for members in shuffled.members] == [set(members) for members in found.members]
    np.testing.assert_allclose(shuffled.centroids, found.centroids)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(2, 5), st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_any_shard_gives_sane_clusters_twice(rows: int, smallest: int, seed: int, width: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(rows, width))
    if coarse:
        points = points.round()
    ids = rng.permutation(100)[:rows].astype(np.int64)
    found = cluster(ids, points, min_cluster_size=smallest)
    check(found, ids, points)
    again = cluster(ids, points, min_cluster_size=smallest)
    assert again.members == found.members
    assert np.array_equal(again.centroids, found.centroids)
    assert bool(found.note) == (rows < 2 * smallest or not found.members)


@pytest.mark.parametrize(("rows", "smallest"), [(1, 2), (3, 2), (2, 5), (9, 5)])
def test_rows_too_few_to_cluster_stand_for_themselves(rows: int, smallest: int) -> None:
    points = np.arange(2.0 * rows).reshape(rows, 2)
    found = cluster(np.arange(rows) + 7, points, min_cluster_size=smallest)
    assert found.members == tuple((row + 7,) for row in range(rows))
    assert np.array_equal(found.centroids, points)
    assert "too few" in found.note


def test_no_rows_give_no_clusters_but_a_width() -> None:
    found = cluster(np.zeros(0, dtype=np.int64), np.zeros((0, 2)), min_cluster_size=2)
    assert (found.members, found.centroids.shape) == ((), (0, 2))


@pytest.mark.parametrize(
    "points", [np.zeros((9, 2)), np.random.default_rng(0).normal(size=(4, 2)), np.arange(16.0).reshape(8, 2)]
)
def test_only_noise_means_no_cluster_and_a_note(points: npt.NDArray[np.float64]) -> None:
    found = cluster(np.arange(len(points)), points, min_cluster_size=2)
    assert found.members == ()
    assert (found.labels == NOISE).all()
    assert "all are noise" in found.note


def test_the_centroid_leans_to_sure_members() -> None:
    points = np.concatenate([planted([12, 12], 3)[0], [[0.0, 2.5]]])
    found = cluster(np.arange(len(points)), points, min_cluster_size=4)
    (members,) = [members for members in found.members if 24 in members]
    number = found.members.index(members)
    plain = points[list(members)].mean(axis=0)
    assert members[-1] == 24
    assert found.centroids[number][1] < plain[1]


def test_no_cluster_is_smaller_than_the_floor_and_no_row_weighs_more_than_its_part() -> None:
    rng = np.random.default_rng(1)
    # Five to a place, two of them equal: they are far surer members than the others.
    centers = np.repeat(rng.normal(size=(8, 2)) * 50, 5, axis=0)
    points = centers + rng.normal(size=centers.shape)
    points[1::5] = points[0::5] + 1e-9
    found = cluster(np.arange(len(points)), points, min_cluster_size=2, min_rows=5)
    assert found.members
    assert all(len(members) >= 5 for members in found.members)
    for members, centroid in zip(found.members, found.centroids, strict=True):
        if len(members) == 5:
            np.testing.assert_allclose(centroid, points[list(members)].mean(axis=0))
    small = cluster(np.arange(len(points)), points, min_cluster_size=2)
    assert min(len(members) for members in small.members) < 5


@pytest.mark.parametrize(
    ("rows", "members", "note"), [(4, 0, "none is in a cluster"), (5, 5, "all are one cluster"), (9, 9, "all are one")]
)
def test_too_few_rows_for_two_clusters_are_one_or_none(rows: int, members: int, note: str) -> None:
    points = np.random.default_rng(0).normal(size=(rows, 2))
    found = cluster(np.arange(rows), points, min_cluster_size=2, min_rows=5)
    assert sum(map(len, found.members)) == members
    assert len(found.members) == (members > 0)
    assert note in found.note


def test_features_without_reduction_can_be_clustered() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    points = rng.normal(size=(3, 500))[labels] * 5 + rng.normal(size=(30, 500))
    found = cluster(np.arange(30), points, min_cluster_size=4)
    assert {frozenset(labels[list(members)].tolist()) for members in found.members} == {
        frozenset({0}),
        frozenset({1}),
        frozenset({2}),
    }
