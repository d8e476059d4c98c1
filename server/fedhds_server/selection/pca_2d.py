"""Centroids in the plane, so that people can see which of them are near each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pca_2d(points: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The first two principal components (n, 2) of the points (n, d); equal points give equal places, always."""
    values = np.asarray(points, dtype=np.float64)
    if len(values) < 2 or (values == values[0]).all():
        return np.zeros((len(values), 2))
    from sklearn.decomposition import PCA

    # Its components have a fixed sign; with one dimension there is no second one.
    components = PCA(min(2, *values.shape), random_state=0).fit_transform(values)
    return np.pad(components, ((0, 0), (0, 2 - components.shape[1])))
