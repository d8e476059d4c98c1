"""The site's own report: what it says is what the map and the picks say, whatever the shard and the names."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import calinski_harabasz_score, silhouette_score

from fedhds.errors import StorageError
from fedhds_client.local_report import (
    DRAWN_POINTS,
    SILHOUETTE_ROWS,
    ClusterMap,
    cluster_map,
    load_map,
    save_map,
    write_local_report,
)

SVG = "{http://www.w3.org/2000/svg}"
SPACES = ("points", "features")


def planted(rows: int = 600, clusters: int = 12, *, dimensions: int = 2, noise: int = 40, seed: int = 0) -> ClusterMap:
    """A shard of planted clusters whose last rows are noise; ids run backwards."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % clusters
    labels[rows - noise :] = -1
    points = rng.normal(size=(clusters, dimensions))[labels] * 8 + rng.normal(size=(rows, dimensions))
    features = (rng.normal(size=(clusters, 32))[labels] + rng.normal(size=(rows, 32))).astype(np.float32)
    return cluster_map(np.arange(rows)[::-1], points, labels, features, seed=seed)


def write(folder: Path, shard: ClusterMap, picks: Any = (), **names: str) -> tuple[dict[str, Any], str]:
    """The JSON and the page."""
    said = {"site": "ward", "run_id": "run", "task_id": "select/0/ward", "strategy": "fedhds", "note": "", **names}
    page = write_local_report(folder, shard, picks=picks, **said)
    assert page == folder / "report.html"
    return json.loads((folder / "report.json").read_bytes()), page.read_text(encoding="utf-8")


def drawing(page: str) -> ElementTree.Element:
    """The map's SVG; parsing it as XML shows that it is well formed."""
    found = re.search(r'<svg class="map".*?</svg>', page, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def marks(svg: ElementTree.Element, shape: str) -> dict[int, str]:
    """What the marks of a shape say, by row."""
    titles = [mark.findtext(f"{SVG}title") or "" for mark in svg.iter(f"{SVG}{shape}")]
    said = {int(title.split()[1].rstrip(",")): title for title in titles}
    assert len(said) == len(titles)
    return said


class Tags(HTMLParser):
    """The start tags of a page with their attributes, and whether every one that needs it is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# Scores and the map.


def test_scores_are_those_of_scikit_learn_without_the_noise() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 4, 300)
    points = rng.normal(size=(300, 2)) + labels[:, None]
    features = (rng.normal(size=(300, 16)) + labels[:, None]).astype(np.float32)
    found = cluster_map(np.arange(300), points, labels, features, seed=0)
    kept = labels >= 0
    for space, values in zip(SPACES, (points, features.astype(np.float64)), strict=True):
        assert found.scores[f"silhouette_{space}"] == pytest.approx(silhouette_score(values[kept], labels[kept]))
        expected = calinski_harabasz_score(values[kept], labels[kept])
        assert found.scores[f"calinski_harabasz_{space}"] == pytest.approx(expected)
    assert len(found.scores) == 4


def test_the_silhouette_of_a_large_shard_is_that_of_a_sample_drawn_with_the_seed() -> None:
    rows = SILHOUETTE_ROWS + 500
    first, again = (planted(rows, noise=0, seed=3) for _ in range(2))
    assert dict(first.scores) == dict(again.scores)
    points, labels = first.points, first.labels
    other = cluster_map(first.ids, points, labels, points, seed=4).scores["silhouette_points"]
    whole = silhouette_score(points, labels)
    assert first.scores["silhouette_points"] != other
    assert [first.scores["silhouette_points"], other] == pytest.approx([whole, whole], abs=0.02)


def test_points_of_two_dimensions_are_the_map() -> None:
    points = np.random.default_rng(0).normal(size=(30, 2))
    found = cluster_map(np.arange(30), points, np.zeros(30), points, seed=0)
    assert (found.points == points).all()
    assert found.dimensions == 2


def test_points_of_more_dimensions_are_shown_by_their_first_two_principal_components(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(50, 2)) * [20, 5]
    turned = np.linalg.qr(rng.normal(size=(9, 9)))[0][:2]
    found = cluster_map(np.arange(50), plane @ turned, np.arange(50) % 2, plane, seed=0)
    between = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    assert np.allclose(np.linalg.norm(found.points[:, None] - found.points[None], axis=2), between)
    assert found.dimensions == 9
    assert "found in 9 dimensions" in write(tmp_path, found)[1]
    assert "dimensions" not in write(tmp_path, planted())[1]


def test_points_of_one_dimension_lie_on_a_line() -> None:
    found = cluster_map(np.arange(6), np.arange(6.0)[:, None], np.arange(6) % 2, np.ones((6, 3)), seed=0)
    assert np.ptp(found.points[:, 0]) == pytest.approx(5)
    assert not found.points[:, 1].any()


def test_parts_of_different_length_are_no_map() -> None:
    with pytest.raises(ValueError, match="labels"):
        cluster_map(np.arange(4), np.zeros((4, 2)), np.zeros(3), np.zeros((3, 5)), seed=0)


# Kept.


def test_a_kept_map_comes_back_as_it_was(tmp_path: Path) -> None:
    shard = planted(50, 3, dimensions=5, noise=4)
    shard = ClusterMap(shard.ids, shard.points, shard.labels, {**shard.scores, "silhouette_points": None}, 5)
    path = tmp_path / "maps" / "map.npz"
    save_map(path, planted(5, 1, noise=0))
    save_map(path, shard)
    found = load_map(path)
    for name in ("ids", "points", "labels"):
        kept, given = getattr(found, name), getattr(shard, name)
        assert kept.dtype == given.dtype
        assert (kept == given).all()
    assert found.scores == shard.scores
    assert found.dimensions == 5
    assert os.listdir(path.parent) == ["map.npz"]
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_no_damage_of_a_kept_map_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    shard = planted(6, 2, noise=1)
    save_map(path, shard)
    whole = path.read_bytes()
    said = []
    # A stride that shares no factor with the fields' sizes: every kind of field is hit.
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = load_map(path)
        except StorageError as error:
            said.append(str(error))
        else:
            # The archive's own notes, such as dates, may change without harm.
            assert found.ids.tolist() == shard.ids.tolist()
            assert found.points.tolist() == shard.points.tolist()
            assert found.labels.tolist() == shard.labels.tolist()
            assert found.scores == shard.scores
    assert len(said) > len(whole) / 7 / 2
    assert not [message for message in said if "map.npz is damaged" not in message]


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", None])
def test_what_is_not_a_map_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "map.npz"
    save_map(path, planted())
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(StorageError, match=r"map\.npz is damaged"):
        load_map(path)


def test_a_damaged_shape_asks_for_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    save_map(path, planted(5000, 2, noise=1))
    whole = path.read_bytes()
    assert whole.count(b"(5000, 2), }       ") == 1
    path.write_bytes(whole.replace(b"(5000, 2), }       ", b"(9999999999999,2),}"))
    with pytest.raises(StorageError, match="damaged"):
        load_map(path)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    np.savez(path, ids=np.array([{}], dtype=object), points=np.zeros((1, 2)), labels=np.zeros(1), facts="{}")
    with pytest.raises(StorageError, match="damaged"):
        load_map(path)


def test_a_map_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.npz"):
        load_map(tmp_path / "absent.npz")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_map(tmp_path / "taken" / "map.npz", planted())
    with pytest.raises(StorageError, match=r"cannot write .*report"):
        write(tmp_path / "taken", planted())


# The report.


def test_the_json_counts_rows_and_names_picks_by_cluster(tmp_path: Path) -> None:
    points = np.arange(14.0).reshape(7, 2)
    shard = cluster_map([60, 50, 40, 30, 20, 10, 0], points, [0, 1, 0, -1, 0, -1, 1], points, seed=0)
    said, _ = write(tmp_path, shard, [60, 30, 20, 20], note="a note")
    assert said == {
        "site": "ward",
        "run_id": "run",
        "task_id": "select/0/ward",
        "strategy": "fedhds",
        "note": "a note",
        "rows": 7,
        "picks": [20, 30, 60],
        "clusters": [{"cluster": 0, "rows": 3, "picks": [20, 60]}, {"cluster": 1, "rows": 2, "picks": []}],
        "no_cluster": {"rows": 2, "picks": [30]},
        "scores": dict(shard.scores),
    }


def test_the_map_marks_picks_by_shape_and_every_row_by_its_cluster(tmp_path: Path) -> None:
    shard = planted()
    picks = shard.ids[::30].tolist()
    _, page = write(tmp_path, shard, picks)
    svg = drawing(page)
    diamonds, dots = marks(svg, "path"), marks(svg, "circle")
    assert sorted(diamonds) == sorted(picks)
    assert sorted([*diamonds, *dots]) == list(range(600))
    for row, label in zip(shard.ids.tolist(), shard.labels.tolist(), strict=True):
        name = "no cluster" if label < 0 else f"cluster {label}"
        assert {**dots, **diamonds}[row] == f"row {row}, {name}{', picked' if row in picks else ''}"
    assert {mark.get("class") for mark in svg.iter(f"{SVG}path")} <= {f"pick k{i}" for i in range(8)} | {"pick none"}
    assert [text.text for text in svg.iter(f"{SVG}text")] == [str(label) for label in range(12)]


def test_the_map_keeps_distances_and_stays_within_its_frame(tmp_path: Path) -> None:
    shard = planted()
    svg = drawing(write(tmp_path, shard)[1])
    at = {}
    for circle in svg.iter(f"{SVG}circle"):
        row = int((circle.findtext(f"{SVG}title") or "").split()[1].rstrip(","))
        at[row] = (float(circle.get("cx", "nan")), float(circle.get("cy", "nan")))
    places = np.array([at[row] for row in shard.ids.tolist()])
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    assert (places > 0).all()
    assert (places < [width, height]).all()
    offsets = shard.points - shard.points[0]
    scale = np.ptp(places[:, 0]) / np.ptp(shard.points[:, 0])
    assert np.allclose(places - places[0], offsets * [scale, -scale], atol=0.11)


def test_the_table_says_the_size_and_the_picks_of_every_cluster(tmp_path: Path) -> None:
    shard = planted()
    by_label = {label: shard.ids[shard.labels == label] for label in range(-1, 12)}
    picked = {0: sorted(by_label[0][:2].tolist()), -1: by_label[-1][:1].tolist()}
    _, page = write(tmp_path, shard, [*picked[0], *picked[-1]])
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.sub(r"<[^>]+>", "|", row) for row in body.strip().splitlines()]
    cells = [[cell for cell in row.split("|") if cell] for row in rows]
    expected = [
        [
            "none" if label < 0 else str(label),
            str(len(by_label[label])),
            str(len(picked.get(label, []))),
            *([", ".join(map(str, picked[label]))] if label in picked else []),
        ]
        for label in (*range(12), -1)
    ]
    assert cells == expected


def test_a_large_shard_is_drawn_in_part_with_all_its_picks_and_says_so(tmp_path: Path) -> None:
    shard = planted(DRAWN_POINTS + 1000, 20)
    picks = range(0, len(shard.ids), 200)
    said, page = write(tmp_path, shard, picks)
    svg = drawing(page)
    assert sorted(marks(svg, "path")) == list(picks) == said["picks"]
    assert len(marks(svg, "circle")) == DRAWN_POINTS - len(picks)
    assert "all picks and 4,970 of the other 5,970 rows" in page
    assert "Drawn are" not in write(tmp_path, planted(), range(3))[1]


def test_picks_are_drawn_however_many_they_are(tmp_path: Path) -> None:
    shard = planted(DRAWN_POINTS + 10)
    _, page = write(tmp_path, shard, range(DRAWN_POINTS + 5))
    svg = drawing(page)
    assert len(marks(svg, "path")) == DRAWN_POINTS + 5
    assert not marks(svg, "circle")
    assert "more, in report.json" in page


def test_names_are_escaped_and_bring_no_tag_of_their_own(tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script>\"'&\udc80"
    names = ("site", "run_id", "task_id", "strategy", "note")
    plain = write(tmp_path, planted(), **dict.fromkeys(names, "x"))[1]
    said, page = write(tmp_path, planted(), **dict.fromkeys(names, evil))
    assert Tags(page).found == Tags(plain).found
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;") == len(names) + 1
    assert [said[name] for name in names] == [evil] * len(names)


def test_the_page_is_well_formed_self_contained_and_described(tmp_path: Path) -> None:
    _, page = write(tmp_path, planted(), range(20))
    tags = Tags(page)
    assert not tags.open
    names = [tag for tag, _ in tags.found]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    assert not [attrs for _, attrs in tags.found if {"src", "href", "onload"} & set(attrs)]
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme:dark" in page
    ids = [attrs["id"] for _, attrs in tags.found if "id" in attrs]
    (label,) = [attrs["aria-labelledby"] for tag, attrs in tags.found if attrs.get("class") == "map" and tag == "svg"]
    assert label is not None
    assert sorted(label.split()) == sorted(str(name) for name in ids)
    assert {attrs.get("scope") for tag, attrs in tags.found if tag == "th"} == {"row", "col"}
    assert names.count("caption") == names.count("table") == 2
    used = {part for _, attrs in tags.found for part in (attrs.get("class") or "").split()}
    assert {f"k{i}" for i in range(8)} <= used
    assert not [f"k{i}" for i in range(8) if f".k{i}{{fill:var(--k{i})}}" not in page or page.count(f"--k{i}:#") != 2]


def test_the_page_says_scores_and_which_are_not_defined(tmp_path: Path) -> None:
    shard = planted()
    _, page = write(tmp_path, shard)
    for space in SPACES:
        assert f">{shard.scores[f'silhouette_{space}']:.3f}<" in page
        assert f">{shard.scores[f'calinski_harabasz_{space}']:,.1f}<" in page
    assert "ot defined" not in page
    _, page = write(tmp_path, planted(30, 1, noise=0))
    assert page.count(">not defined<") == 4


def test_files_are_the_owners_alone_and_replace_each_other_whole(tmp_path: Path) -> None:
    write(tmp_path / "report", planted(), range(20))
    said, page = write(tmp_path / "report", planted(5, 1, noise=0), [3])
    assert said["rows"] == 5
    assert len(marks(drawing(page), "path")) == 1
    files = sorted((tmp_path / "report").iterdir())
    assert [file.name for file in files] == ["report.html", "report.json"]
    assert {os.stat(file).st_mode & 0o777 for file in files} == {0o600}


def test_a_pick_that_is_not_on_the_map_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 600"):
        write(tmp_path, planted(), [0, 600])
    assert not list(tmp_path.iterdir())


def column(*labels: int) -> npt.NDArray[np.int64]:
    return np.array(labels, dtype=np.int64)


SAME = np.full((8, 3), 0.1)
APART = np.random.default_rng(0).normal(size=(8, 3))


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        pytest.param(column(), APART[:0], id="no row"),
        pytest.param(column(0), APART[:1], id="one row"),
        pytest.param(column(-1), APART[:1], id="one row of noise"),
        pytest.param(column(0, 1), APART[:2], id="two rows, each its own cluster"),
        pytest.param(column(0, 0), APART[:2], id="two rows of one cluster"),
        pytest.param(np.full(8, -1), APART, id="all noise"),
        pytest.param(np.zeros(8), APART, id="one cluster"),
        pytest.param(column(0, 0, 0, 0, 0, 0, 0, -1), APART, id="one cluster and noise"),
        pytest.param(np.arange(8), APART, id="clusters of one row"),
        pytest.param(np.arange(8) % 3, SAME, id="identical rows"),
    ],
)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_degenerate_shard_has_a_report_without_scores(
    tmp_path: Path, labels: npt.NDArray[np.int64], values: npt.NDArray[np.float64], dimensions: int
) -> None:
    shard = cluster_map(np.arange(len(labels)), values[:, :dimensions], labels, values.astype(np.float32), seed=0)
    assert set(shard.scores.values()) == {None}
    save_map(tmp_path / "map.npz", shard)
    shard = load_map(tmp_path / "map.npz")
    said, page = write(tmp_path, shard, range(len(labels))[:1])
    assert said["rows"] == len(labels)
    assert said["picks"] == list(range(len(labels)))[:1]
    svg = drawing(page)
    assert len(marks(svg, "path")) + len(marks(svg, "circle")) == len(labels)
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_clusters_of_equal_rows_each_have_a_silhouette_but_no_ratio_of_variances() -> None:
    values = np.repeat([[0.1, 0.2], [3.3, 0.7]], 3, axis=0)
    scores = cluster_map(np.arange(6), values, [0, 0, 0, 1, 1, 1], values, seed=0).scores
    assert scores["silhouette_points"] == pytest.approx(1)
    assert scores["calinski_harabasz_points"] is None
