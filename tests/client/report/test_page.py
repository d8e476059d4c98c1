"""The site's own report: it says what the map and the picks say, for any shard and any names."""

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

from fedhds.errors import StorageError
from fedhds_client.report.cluster_map import ClusterMap, cluster_map, load_map, save_map
from fedhds_client.report.page import MAX_DRAWN_ROWS, write_local_report
from tests.support.planted import planted

SVG = "{http://www.w3.org/2000/svg}"


def write(folder: Path, shard: ClusterMap, picks: Any = (), **names: str) -> tuple[dict[str, Any], str]:
    """The JSON and the page."""
    facts = {"site": "ward", "run_id": "run", "task_id": "select/0/ward", "strategy": "fedhds", "note": "", **names}
    page = write_local_report(folder, shard, picks=picks, **facts)
    assert page == folder / "report.html"
    return json.loads((folder / "report.json").read_bytes()), page.read_text(encoding="utf-8")


def drawing(page: str) -> ElementTree.Element:
    """The map's SVG; parsing it as XML shows that it is well formed."""
    match = re.search(r'<svg class="map".*?</svg>', page, re.DOTALL)
    assert match
    return ElementTree.fromstring(match[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def marks(svg: ElementTree.Element, shape: str) -> dict[int, str]:
    """What the marks of a shape say, by row."""
    titles = [mark.findtext(f"{SVG}title") or "" for mark in svg.iter(f"{SVG}{shape}")]
    text_of_row = {int(title.split()[1].rstrip(",")): title for title in titles}
    assert len(text_of_row) == len(titles)
    return text_of_row


class Tags(HTMLParser):
    """The start tags of a page with their attributes, and whether every one that needs it is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.start_tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.start_tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.start_tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_json_counts_rows_and_names_picks_by_cluster(tmp_path: Path) -> None:
    points = np.arange(14.0).reshape(7, 2)
    shard = cluster_map([60, 50, 40, 30, 20, 10, 0], points, [0, 1, 0, -1, 0, -1, 1], points, seed=0)
    report, _ = write(tmp_path, shard, [60, 30, 20, 20], note="a note")
    assert report == {
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


def test_a_map_of_more_than_two_dimensions_says_so(tmp_path: Path) -> None:
    assert "computed in 9 dimensions" in write(tmp_path, planted(dimensions=9))[1]
    assert "dimensions" not in write(tmp_path, planted())[1]


def test_a_large_shard_is_drawn_in_part_with_all_its_picks_and_says_so(tmp_path: Path) -> None:
    shard = planted(MAX_DRAWN_ROWS + 1000, 20)
    picks = range(0, len(shard.ids), 200)
    report, page = write(tmp_path, shard, picks)
    svg = drawing(page)
    assert sorted(marks(svg, "path")) == list(picks) == report["picks"]
    assert len(marks(svg, "circle")) == MAX_DRAWN_ROWS - len(picks)
    assert "all picks and 4,970 of the other 5,970 rows" in page
    assert "of the other" not in write(tmp_path, planted(), range(3))[1]


def test_picks_are_drawn_however_many_they_are(tmp_path: Path) -> None:
    shard = planted(MAX_DRAWN_ROWS + 10)
    _, page = write(tmp_path, shard, range(MAX_DRAWN_ROWS + 5))
    svg = drawing(page)
    assert len(marks(svg, "path")) == MAX_DRAWN_ROWS + 5
    assert not marks(svg, "circle")
    assert "more, in report.json" in page


def test_names_are_escaped_and_bring_no_tag_of_their_own(tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script>\"'&\udc80"
    names = ("site", "run_id", "task_id", "strategy", "note")
    plain = write(tmp_path, planted(), **dict.fromkeys(names, "x"))[1]
    report, page = write(tmp_path, planted(), **dict.fromkeys(names, evil))
    assert Tags(page).start_tags == Tags(plain).start_tags
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;") == len(names) + 1
    assert [report[name] for name in names] == [evil] * len(names)


def test_the_page_is_well_formed_self_contained_and_described(tmp_path: Path) -> None:
    _, page = write(tmp_path, planted(), range(20))
    tags = Tags(page)
    assert not tags.open
    names = [tag for tag, _ in tags.start_tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    assert not [attrs for _, attrs in tags.start_tags if {"src", "href", "onload"} & set(attrs)]
    assert "url(" not in page
    assert "@import" not in page
    style = re.sub(r"\s", "", page.split("<style>")[1].split("</style>")[0])
    assert "@media(prefers-color-scheme:dark)" in style
    ids = [attrs["id"] for _, attrs in tags.start_tags if "id" in attrs]
    (label,) = [
        attrs["aria-labelledby"] for tag, attrs in tags.start_tags if attrs.get("class") == "map" and tag == "svg"
    ]
    assert label is not None
    assert sorted(label.split()) == sorted(str(name) for name in ids)
    assert {attrs.get("scope") for tag, attrs in tags.start_tags if tag == "th"} == {"row", "col"}
    assert names.count("caption") == names.count("table") == 2
    used = {part for _, attrs in tags.start_tags for part in (attrs.get("class") or "").split()}
    assert {f"k{i}" for i in range(8)} <= used
    assert not [
        f"k{i}" for i in range(8) if f".k{i}{{fill:var(--k{i});}}" not in style or style.count(f"--k{i}:#") != 2
    ]


def test_the_page_says_scores_and_which_are_not_defined(tmp_path: Path) -> None:
    shard = planted()
    _, page = write(tmp_path, shard)
    for space in ("points", "features"):
        assert f">{shard.scores[f'silhouette_{space}']:.3f}<" in page
        assert f">{shard.scores[f'calinski_harabasz_{space}']:,.1f}<" in page
    assert "ot defined" not in page
    _, page = write(tmp_path, planted(30, 1, noise=0))
    assert page.count(">not defined<") == 4


def test_files_are_the_owners_alone_and_replace_each_other_whole(tmp_path: Path) -> None:
    write(tmp_path / "report", planted(), range(20))
    report, page = write(tmp_path / "report", planted(5, 1, noise=0), [3])
    assert report["rows"] == 5
    assert len(marks(drawing(page), "path")) == 1
    files = sorted((tmp_path / "report").iterdir())
    assert [file.name for file in files] == ["report.html", "report.json"]
    assert {os.stat(file).st_mode & 0o777 for file in files} == {0o600}


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*report"):
        write(tmp_path / "taken", planted())


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
    report, page = write(tmp_path, shard, range(len(labels))[:1])
    assert report["rows"] == len(labels)
    assert report["picks"] == list(range(len(labels)))[:1]
    svg = drawing(page)
    assert len(marks(svg, "path")) + len(marks(svg, "circle")) == len(labels)
    assert not re.search(r"\bnan\b|\binf\b", page)
