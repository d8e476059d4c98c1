"""Shards with planted clusters for the tests of the report."""

from __future__ import annotations

import numpy as np

from fedhds_client.report.cluster_map import ClusterMap, cluster_map


def planted(rows: int = 600, clusters: int = 12, *, dimensions: int = 2, noise: int = 40, seed: int = 0) -> ClusterMap:
    """A shard of planted clusters whose last rows are noise; ids run backwards."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % clusters
    labels[rows - noise :] = -1
    points = rng.normal(size=(clusters, dimensions))[labels] * 8 + rng.normal(size=(rows, dimensions))
    features = (rng.normal(size=(clusters, 32))[labels] + rng.normal(size=(rows, 32))).astype(np.float32)
    return cluster_map(np.arange(rows)[::-1], points, labels, features, seed=seed)
