"""The map of a selection: a shard's rows in two dimensions, their clusters and scores, kept until the picks arrive."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedhds.errors import StorageError
from fedhds.runtime.files import replace_file
from fedhds_client.features.clustering import NOISE
from fedhds_client.features.reduction import reduce
from fedhds_client.report.scores import calinski_harabasz, silhouette


@dataclass(frozen=True)
class ClusterMap:
    """A shard's rows in two dimensions, with their clusters; raises ValueError when its parts do not fit together."""

    ids: npt.NDArray[np.int64]
    """(n,) row ids, each once."""
    points: npt.NDArray[np.float64]
    """(n, 2) the reduced points, or their first two principal components when they have more dimensions."""
    labels: npt.NDArray[np.int64]
    """(n,) cluster id of every row; -1 is no cluster."""
    scores: Mapping[str, float | None]
    """`calinski_harabasz` and `silhouette`, each with the suffix `_points` and `_features`; None: not defined."""
    dimensions: int = 2
    """Number of dimensions of the reduced points, in which the clusters were computed."""

    def __post_init__(self) -> None:
        count = len(self.ids)
        if self.ids.shape != (count,) or self.labels.shape != (count,) or self.points.shape != (count, 2):
            raise ValueError(f"{self.ids.shape} ids, {self.labels.shape} labels and {self.points.shape} points")
        if not np.isfinite(self.points).all():
            raise ValueError("points are not finite")


def cluster_map(
    ids: npt.ArrayLike, points: npt.ArrayLike, labels: npt.ArrayLike, features: npt.ArrayLike, *, seed: int
) -> ClusterMap:
    """The map of the rows `ids` (n,), with the clusters `labels` (n,) of their reduced `points` (n, k).

    Scores judge the clusters in the reduced points and in the `features` (n, d) before reduction, without the rows of
    no cluster. `seed` fixes the random parts. Raises ValueError for arguments of different length.
    """
    ids, labels = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    points, features = np.asarray(points, dtype=np.float64), np.asarray(features)
    if len({len(ids), len(points), len(labels), len(features)}) > 1:
        raise ValueError(f"{len(ids)} ids, {len(points)} points, {len(labels)} labels and {len(features)} features")
    scores: dict[str, float | None] = {}
    clustered = labels != NOISE
    for space, values in (("points", points), ("features", features)):
        scores[f"calinski_harabasz_{space}"] = calinski_harabasz(values[clustered], labels[clustered])
        scores[f"silhouette_{space}"] = silhouette(values[clustered], labels[clustered], seed=seed)
    dimensions = points.shape[1]
    plane = points if dimensions == 2 else reduce(points, "pca", seed=seed)[0]
    return ClusterMap(ids, plane, labels, scores, dimensions)


def save_map(path: Path, shard_map: ClusterMap) -> None:
    """Saves the map durably, readable by its owner alone; raises StorageError."""
    stream = io.BytesIO()
    facts = json.dumps({"scores": dict(shard_map.scores), "dimensions": shard_map.dimensions})
    arrays = {"ids": shard_map.ids, "points": shard_map.points, "labels": shard_map.labels, "facts": np.array(facts)}
    np.savez(stream, allow_pickle=False, **arrays)
    replace_file(path, stream.getvalue(), private=True)


def load_map(path: Path) -> ClusterMap:
    """The map that `save_map` wrote; raises StorageError when it cannot be read or is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the map in {path}: {error.strerror}; check the state folder") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # Before numpy reads: a damaged header could ask for any amount of memory.
            if archive.testzip() is not None:
                raise ValueError("checksums differ")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            facts = json.loads(str(arrays["facts"]))
            return ClusterMap(arrays["ids"], arrays["points"], arrays["labels"], facts["scores"], facts["dimensions"])
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise StorageError(f"the map in {path} is damaged; restore the file from a backup") from error
