"""Groups of like rows within a shard: HDBSCAN and its centroids (FedHDS, arXiv 2410.10926, 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NOISE = -1


@dataclass(frozen=True)
class Clusters:
    """The clusters of a shard, numbered from the largest down (equal ones by their smallest id)."""

    ids: npt.NDArray[np.int64]
    """(n,) sample ids, as they were given."""
    labels: npt.NDArray[np.int64]
    """(n,) cluster of every row of `ids`; -1 is noise."""
    centroids: npt.NDArray[np.float64]
    """(k, d) means of the members' places, weighted with their probability of belonging."""
    members: tuple[tuple[int, ...], ...]
    """Per cluster its sample ids, nearest to the centroid first, equally near ones by id."""
    unclustered: tuple[int, ...]
    """Sample ids of the noise, nearest to any centroid first, equally near ones by id."""
    note: str = ""
    """What was unusual, for the log."""


def cluster(
    ids: npt.NDArray[np.int64],
    points: npt.NDArray[np.float64],
    *,
    min_cluster_size: int,
    places: npt.NDArray[np.floating] | None = None,
) -> Clusters:
    """Clusters the finite `points` (n, f) of the samples `ids` (n,); deterministic.

    Centroids and nearness to them are taken of `places` (n, d), or of the points themselves. Settings are the paper's:
    min_samples at its default, no single cluster. HDBSCAN finds no cluster where there is room for one only: then
    every row is a cluster of its own. When all is noise there is no cluster, and the site is not selected.
    """
    from scipy.spatial.distance import cdist

    count = len(ids)
    if count < 2 * min_cluster_size:
        labels, weights = np.arange(count), np.ones(count)
        note = f"too few rows to cluster ({count}): each is its own cluster" if count else "no rows to cluster"
    else:
        labels, weights = _hdbscan(points, min_cluster_size)
        note = "" if (labels != NOISE).any() else f"no cluster among {count} rows: all are noise"
    places = points if places is None else places
    groups = [np.flatnonzero(labels == label) for label in range(int(labels.max(initial=NOISE)) + 1)]
    groups.sort(key=lambda group: (-len(group), int(ids[group].min())))
    renumbered = np.full(count, NOISE, dtype=np.int64)
    centroids = np.zeros((len(groups), places.shape[1]))
    members = []
    for number, group in enumerate(groups):
        renumbered[group] = number
        centroids[number] = np.average(places[group], axis=0, weights=weights[group])
        distances = np.linalg.norm(places[group] - centroids[number], axis=1)
        members.append(tuple(int(ids[row]) for row in group[np.lexsort((ids[group], distances))]))
    noise = np.flatnonzero(renumbered == NOISE)
    to_any = np.zeros(len(noise)) if not groups else cdist(places[noise], centroids).min(axis=1)
    unclustered = tuple(int(ids[row]) for row in noise[np.lexsort((ids[noise], to_any))])
    return Clusters(ids, renumbered, centroids, tuple(members), unclustered, note)


def _hdbscan(
    points: npt.NDArray[np.float64], min_cluster_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Labels and probabilities of belonging, each (n,)."""
    import hdbscan

    # One job: worker processes cost more than the search on a shard, and each would import torch again.
    model = hdbscan.HDBSCAN(min_cluster_size=min_cluster_size, allow_single_cluster=False, core_dist_n_jobs=1)
    model.fit(points)
    return model.labels_.astype(np.int64), model.probabilities_
