"""Cluster scores: scikit-learn's on float64, over the rows that are in a cluster."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import calinski_harabasz_score, silhouette_score

from fedhds_client.report.cluster_map import cluster_map
from fedhds_client.report.scores import MAX_SILHOUETTE_ROWS
from tests.support.planted import planted


def test_scores_are_those_of_scikit_learn_without_the_noise() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 4, 300)
    points = rng.normal(size=(300, 2)) + labels[:, None]
    features = (rng.normal(size=(300, 16)) + labels[:, None]).astype(np.float32)
    result = cluster_map(np.arange(300), points, labels, features, seed=0)
    clustered = labels >= 0
    for space, values in zip(("points", "features"), (points, features.astype(np.float64)), strict=True):
        assert result.scores[f"silhouette_{space}"] == pytest.approx(
            silhouette_score(values[clustered], labels[clustered])
        )
        expected = calinski_harabasz_score(values[clustered], labels[clustered])
        assert result.scores[f"calinski_harabasz_{space}"] == pytest.approx(expected)
    assert len(result.scores) == 4


def test_the_silhouette_of_a_large_shard_is_that_of_a_sample_drawn_with_the_seed() -> None:
    rows = MAX_SILHOUETTE_ROWS + 500
    first, again = (planted(rows, noise=0, seed=3) for _ in range(2))
    assert dict(first.scores) == dict(again.scores)
    points, labels = first.points, first.labels
    other = cluster_map(first.ids, points, labels, points, seed=4).scores["silhouette_points"]
    whole = silhouette_score(points, labels)
    assert first.scores["silhouette_points"] != other
    assert [first.scores["silhouette_points"], other] == pytest.approx([whole, whole], abs=0.02)


def test_clusters_of_equal_rows_each_have_a_silhouette_but_no_ratio_of_variances() -> None:
    values = np.repeat([[0.1, 0.2], [3.3, 0.7]], 3, axis=0)
    scores = cluster_map(np.arange(6), values, [0, 0, 0, 1, 1, 1], values, seed=0).scores
    assert scores["silhouette_points"] == pytest.approx(1)
    assert scores["calinski_harabasz_points"] is None
