"""Ward's linkage without the matrix of distances gives the groups that scipy gives with it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, ward
from scipy.spatial.distance import pdist

from fedhds_server.selection.ward import ward_labels


def by_first_point(labels: np.ndarray) -> np.ndarray:
    """The same groups, numbered by their first points."""
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[inverse]


@pytest.mark.parametrize("seed", range(12))
def test_groups_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(rng.integers(2, 90), rng.integers(1, 6)))
    tree = ward(pdist(points))
    for groups in {1, 2, len(points) // 2 + 1, len(points), len(points) + 3}:
        expected = by_first_point(fcluster(tree, groups, criterion="maxclust"))
        assert np.array_equal(ward_labels(points, np.ones(len(points)), groups), expected)


def test_a_weight_is_as_many_points() -> None:
    rng = np.random.default_rng(0)
    points, weights = rng.normal(size=(30, 3)), rng.integers(1, 5, size=30)
    whole = ward_labels(np.repeat(points, weights, axis=0), np.ones(weights.sum()), 7)
    firsts = np.cumsum([0, *weights[:-1]])
    assert np.array_equal(ward_labels(points, weights, 7), whole[firsts])


@pytest.mark.parametrize("groups", [1, 4, 5, 9])
def test_equal_points_still_give_as_many_groups(groups: int) -> None:
    points = np.repeat(np.eye(3), 3, axis=0)
    labels = ward_labels(points, np.ones(9), groups)
    assert len(np.unique(labels)) == groups


def test_no_points_give_no_groups() -> None:
    assert len(ward_labels(np.zeros((0, 2)), np.zeros(0), 3)) == 0
