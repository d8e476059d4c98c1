"""How well clusters separate rows: scikit-learn's scores in float64, and None where a score is not defined.

A score is not defined for fewer than two clusters, for clusters of one row each, and where nothing varies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Distances between all pairs: 2,000 rows take 32 MB, and the mean over them is within about 0.01 of the shard's.
MAX_SILHOUETTE_ROWS = 2000


def silhouette(values: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], *, seed: int) -> float | None:
    """The mean silhouette (Rousseeuw 1987), -1 to 1, of the rows `values` (n, d) with the clusters `labels` (n,).

    Of more than MAX_SILHOUETTE_ROWS rows it takes a random sample of that size, which depends on `seed`.
    """
    from sklearn.metrics import silhouette_score

    if len(labels) > MAX_SILHOUETTE_ROWS:
        sample = np.random.default_rng(seed).choice(len(labels), MAX_SILHOUETTE_ROWS, replace=False)
        values, labels = values[sample], labels[sample]
    if not 2 <= len(np.unique(labels)) < len(labels) or not _vary(values):
        return None
    return float(silhouette_score(values.astype(np.float64), labels))


def calinski_harabasz(values: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> float | None:
    """Variance between clusters over variance within (Calinski & Harabasz 1974), 0 or more; arguments as above.

    None also where the rows of every cluster are equal: scikit-learn gives 1.0 or a rounding error's inverse there.
    """
    from sklearn.metrics import calinski_harabasz_score

    clusters = np.unique(labels)
    if len(clusters) < 2 or not any(_vary(values[labels == cluster]) for cluster in clusters):
        return None
    return float(calinski_harabasz_score(values.astype(np.float64), labels))


def _vary(values: npt.NDArray[np.floating]) -> bool:
    return bool((values != values[0]).any())
