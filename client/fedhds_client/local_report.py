"""A site's own report on what selection did with its shard: a map of the rows, their clusters and the picks.

It is for the site's people and is never sent. It holds row ids and no text of rows.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedhds.errors import StorageError
from fedhds_client.clustering import NOISE
from fedhds_client.durable import write_private
from fedhds_client.fusion import fuse

# Distances between all pairs: 2,000 rows take 32 MB, and the mean over them is within about 0.01 of the shard's.
SILHOUETTE_ROWS = 2000
# A browser draws this many points at once without a wait, in a file of about half a megabyte.
DRAWN_POINTS = 5000

_LISTED_IDS = 40
_NUMBERED_CLUSTERS = 40


@dataclass(frozen=True)
class ClusterMap:
    """The rows of a shard in the plane, with their clusters; raises ValueError when its parts do not fit together."""

    ids: npt.NDArray[np.int64]
    """(n,) row ids, each once."""
    points: npt.NDArray[np.float64]
    """(n, 2) the fused points, or their first two principal components when they have more dimensions."""
    labels: npt.NDArray[np.int64]
    """(n,) cluster of every row; -1 is none."""
    scores: Mapping[str, float | None]
    """`calinski_harabasz` and `silhouette`, each with `_points` and `_features` behind; None: not defined."""
    dimensions: int = 2
    """Dimensions of the points in which the clusters were found."""

    def __post_init__(self) -> None:
        count = len(self.ids)
        if self.ids.shape != (count,) or self.labels.shape != (count,) or self.points.shape != (count, 2):
            raise ValueError(f"{self.ids.shape} ids, {self.labels.shape} labels and {self.points.shape} points")
        if not np.isfinite(self.points).all():
            raise ValueError("points are not finite")


def cluster_map(
    ids: npt.ArrayLike, points: npt.ArrayLike, labels: npt.ArrayLike, features: npt.ArrayLike, *, seed: int
) -> ClusterMap:
    """The map of the clusters `labels` (n,), found in the fused `points` (n, k), of the rows `ids` (n,).

    Scores judge the clusters in the fused points and in the `features` (n, d) before fusion, without the rows of no
    cluster. They are None where they are not defined: for fewer than two clusters, for clusters of one row each, and
    where nothing varies. The silhouette is that of at most SILHOUETTE_ROWS rows, drawn with `seed`. Raises ValueError
    for arguments of different length.
    """
    ids, labels = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    points, features = np.asarray(points, dtype=np.float64), np.asarray(features)
    if len({len(ids), len(points), len(labels), len(features)}) > 1:
        raise ValueError(f"{len(ids)} ids, {len(points)} points, {len(labels)} labels and {len(features)} features")
    scores: dict[str, float | None] = {}
    clustered = labels != NOISE
    for space, values in (("points", points), ("features", features)):
        kept, kept_labels = values[clustered], labels[clustered]
        scores[f"calinski_harabasz_{space}"] = _calinski_harabasz(kept, kept_labels)
        scores[f"silhouette_{space}"] = _silhouette(kept, kept_labels, seed)
    dimensions = points.shape[1]
    plane = points if dimensions == 2 else fuse(points, "pca", seed=seed)[0]
    return ClusterMap(ids, plane, labels, scores, dimensions)


def save_map(path: Path, map: ClusterMap) -> None:
    """Durably keeps the map, readable by its owner alone; raises StorageError."""
    stream = io.BytesIO()
    facts = json.dumps({"scores": dict(map.scores), "dimensions": map.dimensions})
    np.savez(stream, allow_pickle=False, ids=map.ids, points=map.points, labels=map.labels, facts=np.array(facts))
    write_private(path, stream.getvalue())


def load_map(path: Path) -> ClusterMap:
    """The map that `save_map` kept; raises StorageError when it cannot be read or is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the map in {path}: {error.strerror}; check the state folder") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # Before numpy reads: a damaged header could ask for any amount of memory.
            if archive.testzip() is not None:
                raise ValueError("checksums differ")
        with np.load(io.BytesIO(content), allow_pickle=False) as kept:
            facts = json.loads(str(kept["facts"]))
            return ClusterMap(kept["ids"], kept["points"], kept["labels"], facts["scores"], facts["dimensions"])
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise StorageError(f"the map in {path} is damaged; restore the file from a backup") from error


def write_local_report(
    folder: Path,
    map: ClusterMap,
    *,
    site: str,
    run_id: str,
    task_id: str,
    strategy: str,
    picks: Sequence[int],
    note: str,
) -> Path:
    """Writes report.json and report.html, each at once, readable by their owner alone; gives the path of the latter.

    `picks`: ids of the rows that train. `note`: what was unusual, or empty. Raises ValueError for picks that are not
    on the map, StorageError.
    """
    if unknown := set(picks) - set(map.ids.tolist()):
        raise ValueError(f"the map does not hold the picked row {min(unknown)}")
    picked = np.isin(map.ids, np.asarray(picks, dtype=np.int64))
    groups = [_group(map, picked, number) for number in np.unique(map.labels[map.labels != NOISE]).tolist()]
    noise = _group(map, picked, NOISE)
    names = {"site": site, "run_id": run_id, "task_id": task_id, "strategy": strategy, "note": note}
    content = {
        **names,
        "rows": len(map.ids),
        "picks": _sorted_ids(map, picked),
        "clusters": [{"cluster": group.number, "rows": group.rows, "picks": group.picks} for group in groups],
        "no_cluster": {"rows": noise.rows, "picks": noise.picks},
        "scores": dict(map.scores),
    }
    page = _page(map, picked, groups, noise, names)
    write_private(folder / "report.json", (json.dumps(content, indent=1) + "\n").encode("ascii"))
    write_private(folder / "report.html", page.encode("utf-8", "replace"))
    return folder / "report.html"


@dataclass(frozen=True)
class _Group:
    number: int
    rows: int
    picks: list[int]

    @property
    def colour(self) -> str:
        """Class in the page's style."""
        return "none" if self.number == NOISE else f"k{self.number % len(_COLOURS)}"

    @property
    def name(self) -> str:
        return "no cluster" if self.number == NOISE else f"cluster {self.number}"


def _group(map: ClusterMap, picked: npt.NDArray[np.bool_], number: int) -> _Group:
    members = map.labels == number
    return _Group(number, int(members.sum()), _sorted_ids(map, members & picked))


def _sorted_ids(map: ClusterMap, chosen: npt.NDArray[np.bool_]) -> list[int]:
    return sorted(map.ids[chosen].tolist())


# Scores.


def _calinski_harabasz(values: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> float | None:
    """Variance between clusters over variance within (Calinski & Harabasz 1974), in float64 one cluster at a time.

    Not scikit-learn's, which sums in the features' float32 and says 1 where all variance is between clusters.
    """
    clusters = np.unique(labels)
    spare = len(labels) - len(clusters)
    if len(clusters) < 2 or spare == 0:
        return None
    centre = values.mean(axis=0, dtype=np.float64)
    between = within = 0.0
    for cluster in clusters:
        group = values[labels == cluster].astype(np.float64)
        # Equal rows then differ from their mean by nothing at all.
        offsets = group - group[0]
        mean = offsets.mean(axis=0)
        between += len(group) * float(np.square(group[0] + mean - centre).sum())
        within += float(np.square(offsets - mean).sum())
    return between / within * spare / (len(clusters) - 1) if within > 0 else None


def _silhouette(values: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], seed: int) -> float | None:
    if len(labels) > SILHOUETTE_ROWS:
        drawn = np.random.default_rng(seed).choice(len(labels), SILHOUETTE_ROWS, replace=False)
        values, labels = values[drawn], labels[drawn]
    if not 2 <= len(np.unique(labels)) < len(labels) or (values == values[0]).all():
        return None
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(values.astype(np.float64), labels))


# The page.

# For light and for dark ground, each at 4.5:1 or more against it.
_COLOURS = (
    ("#1b6ec2", "#6cb2ff"),
    ("#b84d06", "#ff9d57"),
    ("#0e7d74", "#3fd0c0"),
    ("#b8336a", "#ff86b0"),
    ("#6b4fbb", "#b7a2ff"),
    ("#567510", "#b4d455"),
    ("#8d5524", "#d9a877"),
    ("#a12fa8", "#ee8ff2"),
)
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1c2026;--quiet:#5a626e;--line:#d5d9df;--none:#6f7681;LIGHT}
@media (prefers-color-scheme:dark){:root{--ground:#15181d;--ink:#eceff3;--quiet:#a3acb8;--line:#383e47;--none:#878f9b;
DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem 1rem 3rem;max-width:46rem;background:var(--ground);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{margin:.5rem 0}
.quiet{color:var(--quiet)}
.note{border-left:4px solid var(--ink);padding-left:.75rem;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}
.facts dt{color:var(--quiet)}
.facts dd{margin:0;overflow-wrap:anywhere}
svg.map{display:block;width:100%;height:auto;max-height:90vh;border:1px solid var(--line);border-radius:6px}
.dots{opacity:.8}
.pick{stroke:var(--ink);stroke-width:1.5}
.number{fill:var(--ink);stroke:var(--ground);stroke-width:3.5;paint-order:stroke;stroke-linejoin:round;
font:bold 13px system-ui,sans-serif;text-anchor:middle}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;list-style:none;padding:0;margin:.5rem 0}
.mark{width:1em;height:1em;vertical-align:-.15em;margin-right:.4em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--quiet);padding-bottom:.25rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .75rem .35rem 0;border-bottom:1px solid var(--line)}
th{font-weight:600}
.count{text-align:right;white-space:nowrap}
.name{white-space:nowrap}
tfoot th,tfoot td{border-top:2px solid var(--ink);border-bottom:0}
"""
_SCORES = (
    (
        "Silhouette",
        "silhouette",
        ".3f",
        "How much nearer a row is to its own cluster than to the next, on average{sample}: 1 when clusters are narrow "
        "and far apart, about 0 when they touch, below 0 when rows are nearer to another cluster than to their own.",
    ),
    (
        "Calinski-Harabasz",
        "calinski_harabasz",
        ",.1f",
        "How far the clusters are apart, relative to how wide they are: higher is better, without an upper end, and "
        "only values of the same shard compare.",
    ),
)

# The drawing is square, so that it is as wide as a phone and text in it is not scaled down far.
_SIDE, _MARGIN = 480, 22
_PICK = "M0-5.5L5.5 0 0 5.5-5.5 0Z"


def _page(
    map: ClusterMap, picked: npt.NDArray[np.bool_], groups: Sequence[_Group], noise: _Group, names: Mapping[str, str]
) -> str:
    site, rows, picks = escape(names["site"]), len(map.ids), int(picked.sum())
    light, dark = ("".join(f"--k{i}:{pair[mode]};" for i, pair in enumerate(_COLOURS)) for mode in (0, 1))
    fills = "".join(f".k{i}{{fill:var(--k{i})}}" for i in range(len(_COLOURS)))
    style = _STYLE.replace("LIGHT", light).replace("DARK", dark) + fills + ".none{fill:var(--none)}"
    drawn = _drawn(picked)
    facts = (
        ("Run", names["run_id"]),
        ("Task", names["task_id"]),
        ("Strategy", names["strategy"]),
        ("Rows", f"{rows:,} in the shard"),
        ("Clusters", f"{len(groups):,} groups of like rows"),
        ("No cluster", f"{noise.rows:,} rows that are like too few others"),
        ("Picks", f"{picks:,} rows that train{f', {picks / rows:.1%} of the shard' if rows else ''}"),
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Whatever the page held, it could load and send nothing.
            """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
            f"<title>Selection at {site}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
            f"<h1>What selection did with the shard of {site}</h1>",
            '<p class="quiet">This report is never sent. It holds no text of rows, only row ids.</p>',
            f'<p class="note">{escape(names["note"])}</p>' if names["note"] else "",
            '<dl class="facts">',
            *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts),
            "</dl>\n<h2>Map</h2>",
            _drawing(map, picked, drawn, groups, noise),
            '<ul class="legend">',
            f"<li>{_mark('k0', picked=False)}a row of a cluster, in the cluster's colour</li>",
            f"<li>{_mark('none', picked=False)}a row of no cluster</li>",
            f"<li>{_mark('k0', picked=True)}a picked row</li>",
            "<li><b>0</b>, <b>1</b>, …: number of the cluster below it</li>\n</ul>",
            f"<p>{_reading(map, drawn, picks, len(groups))}</p>",
            "<h2>Clusters and picks</h2>",
            _cluster_table(groups, noise, rows, picks),
            "<h2>Scores</h2>",
            _score_table(map),
            "<p>Fusion draws like rows together. Where the clusters score well in the fused points and badly in the "
            "features, they are more the fusion's doing than the rows'.</p>",
            "</main>\n</body>\n</html>\n",
        ]
    )


def _reading(map: ClusterMap, drawn: npt.NDArray[np.bool_], picks: int, clusters: int) -> str:
    """How to read the map."""
    said = ["Near rows are alike to the base model; the axes have no unit."]
    if map.dimensions > 2:
        said.append(
            f"The clusters were found in {map.dimensions:,} dimensions, and the map shows the two principal ones: "
            "clusters that overlap here may be apart there."
        )
    if clusters > len(_COLOURS):
        said.append(f"There are {len(_COLOURS)} colours, which repeat.")
    if clusters > _NUMBERED_CLUSTERS:
        said.append(f"Only the {_NUMBERED_CLUSTERS} largest clusters have their number on the map.")
    if not drawn.all():
        others = int(drawn.sum()) - picks
        said.append(f"Drawn are all picks and {others:,} of the other {len(drawn) - picks:,} rows, chosen at random.")
    return " ".join(said)


def _drawn(picked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which rows are on the drawing: all picks, and others up to DRAWN_POINTS."""
    others = np.flatnonzero(~picked)
    room = max(0, DRAWN_POINTS - int(picked.sum()))
    drawn = picked.copy()
    drawn[others if len(others) <= room else np.random.default_rng(0).choice(others, room, replace=False)] = True
    return drawn


def _drawing(
    map: ClusterMap,
    picked: npt.NDArray[np.bool_],
    drawn: npt.NDArray[np.bool_],
    groups: Sequence[_Group],
    noise: _Group,
) -> str:
    """The map as SVG: rows of no cluster at the bottom, then clusters, their numbers, and the picks on top."""
    at = _placed(map.points)
    radius = float(np.clip(60 / np.sqrt(max(1, int(drawn.sum()))), 1.3, 4))
    dots, picks = [], []
    for group in (noise, *groups):
        members = map.labels == group.number
        dots.append(f'<g class="dots {group.colour}">')
        dots += [
            f'<circle cx="{at[row, 0]:.1f}" cy="{at[row, 1]:.1f}" r="{radius:.1f}">'
            f"<title>row {map.ids[row]}, {group.name}</title></circle>"
            for row in np.flatnonzero(members & drawn & ~picked)
        ]
        dots.append("</g>")
        picks += [
            f'<path class="pick {group.colour}" transform="translate({at[row, 0]:.1f} {at[row, 1]:.1f})" d="{_PICK}">'
            f"<title>row {map.ids[row]}, {group.name}, picked</title></path>"
            for row in np.flatnonzero(members & picked)
        ]
    numbers = []
    for group in sorted(groups, key=lambda group: -group.rows)[:_NUMBERED_CLUSTERS]:
        across, down = at[map.labels == group.number].T
        # Above the cluster: picks lie in its middle.
        top = max(14.0, float(np.quantile(down, 0.02)) - 8)
        numbers.append(f'<text class="number" x="{np.median(across):.1f}" y="{top:.1f}">{group.number}</text>')
    title = "Map of the shard: clusters and picks"
    desc = (
        f"{len(map.ids):,} rows as dots, coloured by their cluster of {len(groups):,}, {noise.rows:,} of them grey for "
        f"no cluster; {int(picked.sum()):,} picked rows as outlined diamonds. The table below the map counts the same."
    )
    return "\n".join(
        [
            f'<svg class="map" viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-labelledby="map-title map-desc">',
            f'<title id="map-title">{title}</title>\n<desc id="map-desc">{desc}</desc>',
            *dots,
            *numbers,
            *picks,
            "</svg>",
        ]
    )


def _placed(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Places (n, 2) on the drawing, one scale for both directions; up is up."""
    if not len(points):
        return points
    low, high = points.min(axis=0), points.max(axis=0)
    span = float((high - low).max()) or 1.0
    offsets = (points - (low + high) / 2) / span * (_SIDE - 2 * _MARGIN)
    placed: npt.NDArray[np.float64] = _SIDE / 2 + offsets * np.array([1.0, -1.0])
    return placed


def _mark(colour: str, *, picked: bool) -> str:
    shape = (
        f'<path class="pick {colour}" d="{_PICK}"/>'
        if picked
        else f'<circle class="dots {colour}" cx="0" cy="0" r="4"/>'
    )
    return f'<svg class="mark" viewBox="-8 -8 16 16" aria-hidden="true">{shape}</svg>'


def _cluster_table(groups: Sequence[_Group], noise: _Group, rows: int, picks: int) -> str:
    lines = [
        '<div class="scroll" role="region" aria-label="Clusters and picks" tabindex="0">\n<table>',
        "<caption>Rows: how many of the shard are in the cluster. Picks: how many of them train.</caption>",
        '<thead><tr><th scope="col">Cluster</th><th scope="col" class="count">Rows</th>'
        '<th scope="col" class="count">Picks</th><th scope="col">Ids of the picked rows</th></tr></thead>\n<tbody>',
    ]
    for group in (*groups, noise):
        listed = ", ".join(str(row) for row in group.picks[:_LISTED_IDS])
        if len(group.picks) > _LISTED_IDS:
            listed += f" and {len(group.picks) - _LISTED_IDS:,} more, in report.json"
        name = "none" if group is noise else str(group.number)
        lines.append(
            f'<tr><th scope="row" class="name">{_mark(group.colour, picked=False)}{name}</th>'
            f'<td class="count">{group.rows:,}</td><td class="count">{len(group.picks):,}</td>'
            f"<td>{listed}</td></tr>"
        )
    lines.append(
        f'</tbody>\n<tfoot><tr><th scope="row">All</th><td class="count">{rows:,}</td>'
        f'<td class="count">{picks:,}</td><td></td></tr></tfoot>\n</table>\n</div>'
    )
    return "\n".join(lines)


def _score_table(map: ClusterMap) -> str:
    clustered = int((map.labels != NOISE).sum())
    sample = f" over {SILHOUETTE_ROWS:,} rows drawn at random" if clustered > SILHOUETTE_ROWS else ""
    lines = [
        '<div class="scroll" role="region" aria-label="Scores" tabindex="0">\n<table>',
        "<caption>How well the clusters part the rows, without the rows of no cluster.</caption>",
        '<thead><tr><th scope="col">Score</th><th scope="col" class="count">Fused points</th>'
        '<th scope="col" class="count">Features</th></tr></thead>\n<tbody>',
    ]
    meanings = []
    for title, key, form, meaning in _SCORES:
        values = [map.scores.get(f"{key}_{space}") for space in ("points", "features")]
        cells = "".join(
            f'<td class="count">{"not defined" if value is None else format(value, form)}</td>' for value in values
        )
        lines.append(f'<tr><th scope="row">{title}</th>{cells}</tr>')
        meanings.append(f"<p><b>{title}.</b> {meaning.format(sample=sample)}</p>")
    undefined = any(value is None for value in map.scores.values())
    return "\n".join(
        [
            *lines,
            "</tbody>\n</table>\n</div>",
            *meanings,
            "<p>Not defined: with fewer than two clusters, with one row in each, or where rows do not differ.</p>"
            if undefined
            else "",
        ]
    )
