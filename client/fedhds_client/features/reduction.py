"""Reduction: all-layer features reduced to few dimensions before clustering (FedHDS, arXiv 2410.10926, 3.2).

Every site fits its own reduction, as in the paper, so points of different sites share no frame.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedhds.spec import REDUCED_DIMENSION

if TYPE_CHECKING:
    from fedhds.spec import Reduction

FloatArray = npt.NDArray[np.float64]

_DIMENSIONS = REDUCED_DIMENSION
_PERPLEXITY = 30
# The neighbor search of t-SNE and UMAP costs rows * dimensions, and all-layer features have tens of thousands of
# these; van der Maaten's own recipe for t-SNE reduces to 30 to 50 principal components first.
_INPUT_DIMENSIONS = 50
# umap-learn's default.
_NEIGHBORS = 15
# A full kernel takes rows^2 * 8 bytes and its eigenvectors about rows^3: 32 MB and a second here, 1.8 GB for 15,000.
_KERNEL_ROWS = 2_000
# rows * landmarks * 8 bytes, a few times over: 15,000 rows took 200 MB and a second, 1,000 landmarks twice the memory.
_LANDMARKS = 500
# Half a million distances: the median of so many stays within a percent of that of all.
_WIDTH_ROWS = 1_000
# Equal texts give features that differ in float32's last bits, because batches of other lengths sum in another order.
_EQUAL = 1e-6


def reduce(values: npt.ArrayLike, method: Reduction, *, seed: int) -> tuple[FloatArray, str]:
    """Reduces features (n, d), finite, to points (n, 2), or leaves them with "none"; and a note.

    The note says what was done otherwise than `method` asks, for the log; empty when there is nothing to say. The
    number of dimensions never depends on the rows. The same input and seed give the same points.
    """
    features = np.asarray(values)
    rows = len(features)
    if method == "none":
        return features.astype(np.float64), ""
    if rows == 0:
        return np.zeros((0, _DIMENSIONS)), ""
    slack = _EQUAL * np.abs(features[0]).max()
    if all(np.abs(row - features[0]).max() <= slack for row in features):
        return np.zeros((rows, _DIMENSIONS)), f"all {rows} rows have the same features" if rows > 1 else ""
    if method == "pca":
        return _principal(features, _DIMENSIONS, seed), ""
    if method == "kpca":
        return _kernel_principal(features, seed)
    name, reduce = ("UMAP", _umap) if method == "umap" else ("t-SNE", _tsne)
    if rows <= 3:
        return _principal(features, _DIMENSIONS, seed), f"{rows} rows are too few for {name}: PCA instead"
    return reduce(_principal(features, _INPUT_DIMENSIONS, seed), seed), ""


def _principal(features: npt.NDArray[np.floating], dimensions: int, seed: int) -> FloatArray:
    """The first principal components, as many as there are; at least two columns, filled up with zeros."""
    from sklearn.decomposition import PCA

    # n centered rows span n - 1 dimensions; one more would be rounding errors.
    count = min(dimensions, len(features) - 1, features.shape[1])
    components = PCA(count, random_state=seed).fit_transform(features).astype(np.float64)
    missing = max(0, _DIMENSIONS - count)
    return np.pad(components, ((0, 0), (0, missing)))


def _tsne(features: FloatArray, seed: int) -> FloatArray:
    from sklearn.manifold import TSNE

    reduction = TSNE(_DIMENSIONS, perplexity=_perplexity(len(features)), init="pca", random_state=seed)
    points: FloatArray = reduction.fit_transform(features).astype(np.float64)
    return points


def _perplexity(rows: int) -> float:
    """The paper's min(30, n - 1), but a third of n - 1 where that is the smaller.

    A perplexity of n - 1 makes every other row an equal neighbor, and the features count for nothing: four well
    separated groups in 24 rows were found with an adjusted Rand index of 0.1, against 1.0 with a third of it (10
    seeds); from 33 rows on the paper's value finds them.
    """
    return _PERPLEXITY if rows > _PERPLEXITY + 1 else (rows - 1) / 3


def _umap(features: FloatArray, seed: int) -> FloatArray:
    """UMAP (McInnes et al., arXiv 1802.03426); other settings are umap-learn's defaults."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        # numba does not read it, and sets the process's OpenMP threads to all cores: on a shared host everything that
        # runs after it, t-SNE foremost, then spends its time in threads that wait for each other.
        os.environ.setdefault("NUMBA_NUM_THREADS", threads)
    with warnings.catch_warnings():
        # umap-learn says at import that it lacks TensorFlow, which only its ParametricUMAP needs.
        warnings.simplefilter("ignore", ImportWarning)
        from umap import UMAP

    reduction = UMAP(
        _neighbors(len(features)),
        n_components=_DIMENSIONS,
        # The default 0.1 keeps like rows apart to be looked at; they are to be clustered.
        min_dist=0.0,
        # The default, spectral, warns where no neighbor joins the groups, as with ten in 80 rows.
        init="pca",
        random_state=seed,
        # A seed allows no more.
        n_jobs=1,
    )
    points: FloatArray = reduction.fit_transform(features).astype(np.float64)
    return points


def _neighbors(rows: int) -> int:
    """Neighbors of a row, itself among them: half of a small shard, so that its groups are told apart.

    With all rows as neighbors, four groups in 16 rows were found with an adjusted Rand index down to 0.3, with two,
    two groups in 8 rows down to 0; with half of them always (12 seeds).
    """
    return min(_NEIGHBORS, max(3, rows // 2))


def _kernel_principal(features: npt.NDArray[np.floating], seed: int) -> tuple[FloatArray, str]:
    """Kernel PCA (Schölkopf et al. 1998) with exp(-|x - y|^2 / w), w = _squared_width; and a note.

    Beyond _KERNEL_ROWS rows the kernel is approximated from the distances to a random subset of these (Nyström;
    Williams & Seeger 2001), so that memory grows with the rows and not with their square.
    """
    from sklearn.decomposition import KernelPCA
    from sklearn.kernel_approximation import Nystroem

    rows = len(features)
    # Distances are taken from products, which would lose what little tells rows far from the origin apart.
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    rounding = features.shape[1] * float(_EQUAL * np.abs(features).max()) ** 2
    gamma = 1 / _squared_width(centered, rounding, seed)
    if rows <= _KERNEL_ROWS:
        # The iterative solver, the default from 200 rows on, may fail where the kernel has few values above zero.
        reduction = KernelPCA(_DIMENSIONS, kernel="rbf", gamma=gamma, eigen_solver="dense")
        points: FloatArray = reduction.fit_transform(centered)
        return points, ""
    mapped = Nystroem(gamma=gamma, n_components=_LANDMARKS, random_state=seed).fit_transform(centered)
    return (
        _principal(mapped, _DIMENSIONS, seed),
        f"{rows} rows are too many for a full kernel (at most {_KERNEL_ROWS}): {_LANDMARKS} of them as landmarks",
    )


def _squared_width(centered: FloatArray, rounding: float, seed: int) -> float:
    """The median squared distance between rows, over a sample (the median heuristic; Garreau et al., arXiv 1707.07269).

    Where half of the pairs are equal, up to `rounding`, that would be no width: then the mean over all pairs.
    """
    from scipy.spatial.distance import pdist

    sample = centered
    if len(centered) > _WIDTH_ROWS:
        sample = centered[np.random.default_rng(seed).choice(len(centered), _WIDTH_ROWS, replace=False)]
    median = float(np.median(pdist(sample, "sqeuclidean")))
    return median if median > rounding else 2 * float(np.square(centered).sum(axis=1).mean())
