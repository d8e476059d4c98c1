"""Reduction of features: always finite, of a fixed width, repeatable, and telling groups apart."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from fedhds.spec import Reduction
from fedhds_client.features.clustering import cluster
from fedhds_client.features.reduction import _KERNEL_ROWS, _neighbors, _perplexity, reduce

# The first use of UMAP in a process compiles it for some ten seconds.
UMAP = pytest.param("umap", marks=pytest.mark.slow)
METHODS = ["tsne", UMAP, "pca", "kpca", "none"]
KINDS = ["random", "identical", "nearly identical", "close", "two values", "one column", "zero"]


def planted(rows: int, *, groups: int, seed: int = 0, width: int = 200) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Features of well separated groups in mixed order, and every row's group."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % groups)
    return (rng.normal(size=(groups, width))[labels] * 2 + rng.normal(size=(rows, width))).astype(np.float32), list(
        labels
    )


@pytest.mark.parametrize("method", [pytest.param("tsne", marks=pytest.mark.slow), *METHODS[1:]])
@settings(max_examples=24, deadline=None)
@given(rows=st.integers(0, 64), kind=st.sampled_from(KINDS))
@example(rows=0, kind="random")
@example(rows=1, kind="zero")
@example(rows=2, kind="two values")
@example(rows=3, kind="one column")
@example(rows=4, kind="close")
@example(rows=5, kind="identical")
@example(rows=31, kind="nearly identical")
@example(rows=32, kind="nearly identical")
def test_points_are_finite_and_their_width_is_public(method: Reduction, rows: int, kind: str) -> None:
    rng = np.random.default_rng(rows)
    values = {
        "random": rng.normal(size=(rows, 70)),
        "identical": np.full((rows, 70), 0.1),
        "nearly identical": 0.1 + 1e-9 * rng.normal(size=(rows, 70)),
        "close": 1 + 1e-5 * rng.normal(size=(rows, 70)),
        "two values": np.where(np.arange(rows)[:, None] % 2, 0.3, -7.0) * np.ones((rows, 70)),
        "one column": rng.normal(size=(rows, 1)),
        "zero": np.zeros((rows, 70)),
    }[kind].astype(np.float32)
    points, _ = reduce(values, method, seed=1)
    assert points.shape == (rows, values.shape[1] if method == "none" else 2)
    assert np.isfinite(points).all()
    assert np.array_equal(points, reduce(values, method, seed=1)[0])


@pytest.mark.parametrize(
    ("values", "method", "said"),
    [
        (np.eye(3), "tsne", "3 rows are too few for t-SNE"),
        (np.eye(4), "tsne", ""),
        (np.eye(3), "pca", ""),
        (np.ones((9, 4)), "tsne", "all 9 rows have the same features"),
        (np.ones((1, 4)), "tsne", ""),
        (np.ones((0, 4)), "tsne", ""),
        (np.eye(3), "umap", "3 rows are too few for UMAP: PCA instead"),
        pytest.param(np.eye(4), "umap", "", marks=pytest.mark.slow),
        (np.ones((9, 4)), "umap", "all 9 rows have the same features"),
        (np.eye(2), "kpca", ""),
        (np.ones((9, 4)), "kpca", "all 9 rows have the same features"),
        (np.random.default_rng(0).normal(size=(_KERNEL_ROWS, 4)), "kpca", ""),
        (
            np.random.default_rng(0).normal(size=(_KERNEL_ROWS + 1, 4)),
            "kpca",
            "2001 rows are too many for a full kernel",
        ),
    ],
)
def test_what_was_done_otherwise_is_said(values: npt.NDArray[np.float64], method: Reduction, said: str) -> None:
    _, note = reduce(values, method, seed=0)
    assert (said in note) if said else not note


@pytest.mark.parametrize("method", ["tsne", "umap", "pca", "kpca"])
def test_nothing_is_left_of_identical_rows_but_the_origin(method: Reduction) -> None:
    assert not reduce(np.full((7, 5), 3.3, dtype=np.float32), method, seed=0)[0].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_planted_groups_are_found_again(method: Reduction, rows: int) -> None:
    """Three groups: two components, linear or not, have no room for more."""
    for seed in range(3):
        values, labels = planted(rows, groups=3, seed=seed)
        points, note = reduce(values, method, seed=seed)
        assert not note
        found = cluster(np.arange(rows), points, min_cluster_size=rows // 6)
        assert adjusted_rand_score(labels, found.labels) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 16, 24, 80])
def test_umap_tells_more_groups_apart_than_two_components_would(rows: int) -> None:
    """With two neighbors only, small shards would come out as pairs."""
    groups = 2 if rows < 16 else 4 if rows < 80 else 10
    for seed in range(12):
        values, labels = planted(rows, groups=groups, seed=seed)
        points, _ = reduce(values, "umap", seed=seed)
        found = cluster(np.arange(rows), points, min_cluster_size=max(2, rows // groups // 2))
        assert adjusted_rand_score(labels, found.labels) > 0.9


@pytest.mark.parametrize(("rows", "neighbors"), [(4, 3), (8, 4), (29, 14), (30, 15), (500, 15)])
def test_a_small_shard_has_fewer_neighbors_than_rows(rows: int, neighbors: int) -> None:
    assert _neighbors(rows) == neighbors


@pytest.mark.slow
def test_umap_follows_the_seed() -> None:
    values, _ = planted(40, groups=3)
    assert not np.array_equal(reduce(values, "umap", seed=0)[0], reduce(values, "umap", seed=1)[0])


def test_kernel_pca_finds_the_groups_of_a_large_shard_without_its_full_kernel() -> None:
    rows = 6_000
    values, labels = planted(rows, groups=3, width=20)
    tracemalloc.start()
    points, note = reduce(values, "kpca", seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "landmarks" in note
    assert peak < rows * rows * 8 / 2
    assert np.array_equal(points, reduce(values, "kpca", seed=0)[0])
    found = cluster(np.arange(rows), points, min_cluster_size=500)
    assert adjusted_rand_score(labels, found.labels) > 0.9


@pytest.mark.parametrize("rows", [200, _KERNEL_ROWS + 1])
def test_kernel_pca_has_a_width_where_most_rows_are_equal(rows: int) -> None:
    values = np.full((rows, 30), 0.1, dtype=np.float32)
    values[:10] = 5
    points, _ = reduce(values, "kpca", seed=0)
    assert np.isfinite(points).all()
    assert np.linalg.norm(points[0] - points[-1]) > 100 * np.ptp(points[10:], axis=0).max()


def test_kernel_pca_does_not_depend_on_where_the_origin_is() -> None:
    values = planted(40, groups=3)[0].astype(np.float64)
    assert np.allclose(reduce(values, "kpca", seed=0)[0], reduce(values + 1e6, "kpca", seed=0)[0], atol=1e-6)


def test_what_is_slow_to_import_waits_for_its_use() -> None:
    slow = {"umap", "numba", "sklearn"}
    code = f"import sys, fedhds_client.features.reduction; sys.exit(bool({slow} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("rows", [8, 16, 24, 31, 48, 80])
def test_tsne_tells_planted_groups_apart(rows: int) -> None:
    """With the paper's perplexity of n - 1, shards of up to 31 rows would come out as one round cloud."""
    groups = 2 if rows < 16 else 4
    values, labels = planted(rows, groups=groups)
    points, _ = reduce(values, "tsne", seed=0)
    found = cluster(np.arange(rows), points, min_cluster_size=2)
    assert len(found.members) >= groups
    for members in found.members:
        assert len({labels[row] for row in members}) == 1


@pytest.mark.parametrize(("rows", "perplexity"), [(4, 1), (31, 10), (32, 30), (500, 30)])
def test_perplexity_is_the_papers_where_that_says_something(rows: int, perplexity: float) -> None:
    assert _perplexity(rows) == perplexity


def test_pca_keeps_the_largest_spread() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 30)) * np.array([50.0, 20.0, *[0.1] * 28])
    points, _ = reduce(values, "pca", seed=0)
    assert abs(np.corrcoef(points[:, 0], values[:, 0])[0, 1]) > 0.999
    assert abs(np.corrcoef(points[:, 1], values[:, 1])[0, 1]) > 0.98
