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
    min_rows: int = 1,
    places: npt.NDArray[np.floating] | None = None,
) -> Clusters:
    """Clusters the finite `points` (n, f) of the samples `ids` (n,); deterministic.

    Centroids and nearness to them are taken of `places` (n, d), or of the points themselves. Settings are the paper's:
    min_samples at its default, no single cluster. HDBSCAN finds no cluster where there is room for one only: then
    every row is a cluster of its own. When all is noise there is no cluster, and the site is not selected.

    With `min_rows` above 1 no cluster has fewer rows, and none of its rows weighs more than 1/min_rows of its
    centroid: a mean over fewer rows says what these are. Where there is room for one cluster only, it has all rows.
    """
    from scipy.spatial.distance import cdist

    count, smallest = len(ids), max(min_cluster_size, min_rows)
    if count < 2 * smallest:
        labels, weights = np.full(count, NOISE), np.ones(count)
        note = f"too few rows to cluster ({count}), " if count else "no rows to cluster"
        if count and min_rows == 1:
            labels, note = np.arange(count), note + "each is its own cluster"
        elif count >= smallest:
            labels, note = np.zeros(count, dtype=np.int64), note + "all are one cluster"
        elif count:
            note += "none is in a cluster"
    else:
        labels, weights = _hdbscan(points, smallest, min_samples=min_cluster_size)
        note = "" if (labels != NOISE).any() else f"no cluster among {count} rows: all are noise"
    places = points if places is None else places
    groups = [np.flatnonzero(labels == label) for label in range(int(labels.max(initial=NOISE)) + 1)]
    groups.sort(key=lambda group: (-len(group), int(ids[group].min())))
    renumbered = np.full(count, NOISE, dtype=np.int64)
    centroids = np.zeros((len(groups), places.shape[1]))
    members = []
    for number, group in enumerate(groups):
        renumbered[group] = number
        shares = weights[group] / weights[group].sum()
        even = shares.max() > 1 / min_rows
        centroids[number] = np.average(places[group], axis=0, weights=None if even else shares)
        distances = np.linalg.norm(places[group] - centroids[number], axis=1)
        members.append(tuple(int(ids[row]) for row in group[np.lexsort((ids[group], distances))]))
    noise = np.flatnonzero(renumbered == NOISE)
    to_any = np.zeros(len(noise)) if not groups else cdist(places[noise], centroids).min(axis=1)
    unclustered = tuple(int(ids[row]) for row in noise[np.lexsort((ids[noise], to_any))])
    return Clusters(ids, renumbered, centroids, tuple(members), unclustered, note)


def _hdbscan(
    points: npt.NDArray[np.float64], min_cluster_size: int, *, min_samples: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Labels and probabilities of belonging, each (n,)."""
    import hdbscan

    # One job: worker processes cost more than the search on a shard, and each would import torch again.
    model = hdbscan.HDBSCAN(
        min_cluster_size=min_cluster_size, min_samples=min_samples, allow_single_cluster=False, core_dist_n_jobs=1
    )
    model.fit(points)
    return model.labels_.astype(np.int64), model.probabilities_
