"""Reduction of features: always finite, of a fixed width, repeatable, and telling groups apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fedhds.runspec import Fusion
from fedhds_client.clustering import cluster
from fedhds_client.fusion import _perplexity, fuse

SIZES = [0, 1, 2, 3, 4, 5, 31, 32, 60]
METHODS: list[Fusion] = ["tsne", "pca", "none"]


def planted(rows: int, *, groups: int, seed: int = 0, width: int = 200) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Features of well separated groups in mixed order, and every row's group."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % groups)
    return (rng.normal(size=(groups, width))[labels] * 2 + rng.normal(size=(rows, width))).astype(np.float32), list(
        labels
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(
    "kind", ["random", "identical", "nearly identical", "close", "two values", "one column", "zero"]
)
def test_points_are_finite_and_their_width_is_public(method: Fusion, rows: int, kind: str) -> None:
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
    points, _ = fuse(values, method, seed=1)
    assert points.shape == (rows, values.shape[1] if method == "none" else 2)
    assert np.isfinite(points).all()
    assert np.array_equal(points, fuse(values, method, seed=1)[0])


@pytest.mark.parametrize(
    ("values", "method", "said"),
    [
        (np.eye(3), "tsne", "3 rows are too few for t-SNE"),
        (np.eye(4), "tsne", ""),
        (np.eye(3), "pca", ""),
        (np.ones((9, 4)), "tsne", "all 9 rows have the same features"),
        (np.ones((1, 4)), "tsne", ""),
        (np.ones((0, 4)), "tsne", ""),
    ],
)
def test_what_was_done_otherwise_is_said(values: npt.NDArray[np.float64], method: Fusion, said: str) -> None:
    _, note = fuse(values, method, seed=0)
    assert (said in note) if said else not note


def test_nothing_is_left_of_identical_rows_but_the_origin() -> None:
    assert not fuse(np.full((7, 5), 3.3, dtype=np.float32), "tsne", seed=0)[0].any()


@pytest.mark.parametrize("rows", [8, 16, 24, 31, 48, 80])
def test_tsne_tells_planted_groups_apart(rows: int) -> None:
    """With the paper's perplexity of n - 1, shards of up to 31 rows would come out as one round cloud."""
    groups = 2 if rows < 16 else 4
    values, labels = planted(rows, groups=groups)
    points, _ = fuse(values, "tsne", seed=0)
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
    points, _ = fuse(values, "pca", seed=0)
    assert abs(np.corrcoef(points[:, 0], values[:, 0])[0, 1]) > 0.999
    assert abs(np.corrcoef(points[:, 1], values[:, 1])[0, 1]) > 0.98
