"""The report's two files: report.json for scripts, and report.html, a page that draws the map and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedhds.runtime.files import replace_file
from fedhds_client.features.clustering import NOISE
from fedhds_client.report.cluster_map import ClusterMap
from fedhds_client.report.scores import MAX_SILHOUETTE_ROWS

# A browser draws this many marks at once without a wait, in a file of about half a megabyte.
MAX_DRAWN_ROWS = 5000

_MAX_LISTED_IDS = 40
_MAX_NUMBERED_CLUSTERS = 40
# Those of page.css, --k0 and up.
_COLORS = 8
# The drawing is square, so that it is as wide as a phone and text in it is not scaled down far.
_SIDE, _MARGIN = 480, 22


@dataclass(frozen=True)
class _Mark:
    row_id: int
    x: float
    y: float


@dataclass(frozen=True)
class _Cluster:
    cluster_id: int
    """NOISE for the rows of no cluster."""
    rows: int
    picks: list[_Mark]
    """All its picked rows, by id."""
    dots: list[_Mark]
    """Those of its other rows that are drawn."""
    number_x: float
    number_y: float
    """Where the drawing has its number: above the cluster, as picks lie in its middle."""

    @property
    def color(self) -> str:
        """Class in page.css."""
        return "none" if self.cluster_id == NOISE else f"k{self.cluster_id % _COLORS}"


def write_local_report(
    folder: Path,
    shard_map: ClusterMap,
    *,
    site: str,
    run_id: str,
    task_id: str,
    strategy: str,
    picks: Sequence[int],
    note: str,
) -> Path:
    """Writes report.json and report.html, readable by their owner alone; returns the path of report.html.

    `picks`: ids of the rows that train. `note`: what was unusual, or empty. Raises ValueError for picks that are not
    on the map, StorageError when a file cannot be written.
    """
    if unknown := set(picks) - set(shard_map.ids.tolist()):
        raise ValueError(f"the map does not hold the picked row {min(unknown)}")
    picked = np.isin(shard_map.ids, np.asarray(picks, dtype=np.int64))
    drawn = _drawn(picked)
    places = _places(shard_map.points)
    noise, *clusters = (
        _cluster(shard_map, cluster_id, places, picked, drawn)
        for cluster_id in (NOISE, *np.unique(shard_map.labels[shard_map.labels != NOISE]).tolist())
    )
    summary = {
        "site": site,
        "run_id": run_id,
        "task_id": task_id,
        "strategy": strategy,
        "note": note,
        "rows": len(shard_map.ids),
        "picks": sorted(shard_map.ids[picked].tolist()),
        "clusters": [{"cluster": cluster.cluster_id, **_counts(cluster)} for cluster in clusters],
        "no_cluster": _counts(noise),
        "scores": dict(shard_map.scores),
    }
    environment = Environment(
        loader=PackageLoader("fedhds_client.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = "{:,}".format
    page = environment.get_template("page.html.j2").render(
        summary,
        clusters=clusters,
        noise=noise,
        dimensions=shard_map.dimensions,
        drawn=int(drawn.sum()),
        radius=round(float(np.clip(60 / np.sqrt(max(1, drawn.sum())), 1.3, 4)), 1),
        side=_SIDE,
        colors=_COLORS,
        max_listed=_MAX_LISTED_IDS,
        max_numbered=_MAX_NUMBERED_CLUSTERS,
        numbered=sorted(clusters, key=lambda cluster: -cluster.rows)[:_MAX_NUMBERED_CLUSTERS],
        sample=MAX_SILHOUETTE_ROWS if len(shard_map.ids) - noise.rows > MAX_SILHOUETTE_ROWS else None,
    )
    replace_file(folder / "report.json", json.dumps(summary, indent=1) + "\n", private=True)
    replace_file(folder / "report.html", page.encode("utf-8", "replace"), private=True)
    return folder / "report.html"


def _counts(cluster: _Cluster) -> dict[str, int | list[int]]:
    return {"rows": cluster.rows, "picks": [pick.row_id for pick in cluster.picks]}


def _cluster(
    shard_map: ClusterMap,
    cluster_id: int,
    places: npt.NDArray[np.float64],
    picked: npt.NDArray[np.bool_],
    drawn: npt.NDArray[np.bool_],
) -> _Cluster:
    members = shard_map.labels == cluster_id

    def marks(rows: npt.NDArray[np.bool_]) -> list[_Mark]:
        return [
            _Mark(row_id, round(x, 1), round(y, 1))
            for row_id, (x, y) in sorted(zip(shard_map.ids[rows].tolist(), places[rows].tolist(), strict=True))
        ]

    across, down = places[members].T if members.any() else np.zeros((2, 1))
    return _Cluster(
        cluster_id,
        int(members.sum()),
        marks(members & picked),
        marks(members & drawn & ~picked),
        round(float(np.median(across)), 1),
        round(max(14.0, float(np.quantile(down, 0.02)) - 8), 1),
    )


def _drawn(picked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which rows are on the drawing: all picks, and others up to MAX_DRAWN_ROWS."""
    others = np.flatnonzero(~picked)
    room = max(0, MAX_DRAWN_ROWS - int(picked.sum()))
    drawn = picked.copy()
    drawn[others if len(others) <= room else np.random.default_rng(0).choice(others, room, replace=False)] = True
    return drawn


def _places(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Places (n, 2) on the drawing of points (n, 2), at one scale for both directions; up is up."""
    if not len(points):
        return points
    low, high = points.min(axis=0), points.max(axis=0)
    span = float((high - low).max()) or 1.0
    offsets = (points - (low + high) / 2) / span * (_SIDE - 2 * _MARGIN)
    places: npt.NDArray[np.float64] = _SIDE / 2 + offsets * np.array([1.0, -1.0])
    return places
