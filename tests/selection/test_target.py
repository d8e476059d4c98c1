"""Targeted selection: rows of the wanted task are picked wherever they are, and no query starves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation import Outcome, Shards, select
from fedhds.errors import PrivacyError, TaskError
from fedhds.privacy.ledger import Ledger
from fedhds.privacy.mechanisms import centroid_sensitivity
from fedhds.spec import BINS, RunSpec
from fedhds.v2.selection_pb2 import QueryRows, TargetQueries, TargetReport
from fedhds_client.selection.target import _queries, _told
from fedhds_server.selection import STRATEGIES

FloatArray = npt.NDArray[np.float32]

_DIMENSION = 16
NOISE: dict[str, Any] = {"selection_clip_norm": 1.0, "selection_noise_multiplier": 0.5}


def unit(values: npt.NDArray[np.float64]) -> FloatArray:
    scaled: FloatArray = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def world(seed: int = 0) -> tuple[Shards, dict[str, npt.NDArray[np.int64]], FloatArray]:
    """Five sites with rows of ten tasks, and twelve rows more, of the tasks 0 (large) and 1 (small)."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(10, _DIMENSION))

    def rows(tasks: npt.NDArray[np.int64]) -> FloatArray:
        return unit(centers[tasks] + 0.3 * rng.normal(size=(len(tasks), _DIMENSION)))

    shards, truth = {}, {}
    tasks = rng.permutation(np.concatenate([np.repeat(0, 60), np.repeat(1, 12), np.repeat(np.arange(2, 10), 30)]))
    for number, part in enumerate(np.array_split(tasks, 5)):
        shards[f"site-{number}"], truth[f"site-{number}"] = rows(part), part
    return shards, truth, rows(np.repeat([0, 1], 6))


def run(folder: Path, strategy: str = "target-features", **settings: Any) -> Outcome:
    shards, _, wanted = world()
    options: dict[str, Any] = {
        "targets": {"site-3": wanted},
        "selection_budget": "20",
        "target_queries": 2,
        "max_weight_share": 1.0,
    }
    return select(shards, folder, strategy, **(options | settings))


def tasks_of(outcome: Outcome) -> list[int]:
    truth = world()[1]
    return sorted(int(truth[site][row]) for site, row in outcome.rows)


@pytest.mark.parametrize("strategy", ["target-features", "target-gradients"])
def test_the_rows_of_the_wanted_tasks_are_picked_from_all_sites_and_no_query_starves(
    tmp_path: Path, strategy: str
) -> None:
    outcome = run(tmp_path, strategy, min_cluster_rows=1)
    tasks = tasks_of(outcome)
    assert tasks.count(0) == tasks.count(1) == 10
    assert len(outcome.picks) >= 4
    # Beyond the small task its query gives the rows that are next nearest to it.
    more = tasks_of(run(tmp_path / "more", strategy, selection_budget="40", min_cluster_rows=1))
    assert more.count(1) == 12
    assert more.count(0) == 20
    # Groups of five rows at each site blur where few rows of a task lie.
    blurred = tasks_of(run(tmp_path / "blurred", strategy))
    assert blurred.count(0) == 10
    assert 5 <= blurred.count(1) <= 10


def test_the_picks_are_those_of_a_search_in_one_place(tmp_path: Path) -> None:
    shards, _, _ = world()
    outcome = run(tmp_path, min_cluster_rows=1)
    (queries,) = (report for site, report in outcome.reports if site == "site-3" and report.values)
    vectors = np.array(queries.values).reshape(-1, _DIMENSION)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = [(site, row) for site in shards for row in range(len(shards[site]))]
    distances = np.linalg.norm(np.concatenate([*shards.values()])[:, None] - vectors[None], axis=2)
    for query in range(2):
        own = [place for place in range(len(keys)) if distances[place].argmin() == query]
        order = sorted(own, key=lambda place: distances[place, query])
        picked = [place for place in own if keys[place] in set(outcome.rows)]
        assert len(picked) == 10
        # Up to a bin of the histogram.
        assert distances[picked, query].max() <= distances[order[9], query] + 2 / BINS


def test_the_order_of_sites_does_not_matter(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one"), run(tmp_path / "other", order=lambda names: names[::-1])
    assert one.picks == other.picks


def test_queries_of_several_sites_count_alike(tmp_path: Path) -> None:
    _, _, wanted = world()
    outcome = run(tmp_path, targets={"site-0": wanted[:6], "site-4": wanted[6:]}, target_queries=1, min_cluster_rows=1)
    tasks = tasks_of(outcome)
    assert tasks.count(0) == tasks.count(1) == 10


def test_filters_come_before_the_search(tmp_path: Path) -> None:
    _, truth, _ = world()
    scores = {"alignment": {site: np.where(np.arange(len(tasks)) % 2, 1.0, -1.0) for site, tasks in truth.items()}}
    outcome = run(tmp_path, scores=scores, selection_filters="alignment", filter_keep="45%", min_cluster_rows=1)
    assert len(outcome.rows) == 20
    assert all(row % 2 for _, row in outcome.rows)
    assert {0, 1} <= set(tasks_of(outcome))


def test_without_target_rows_anywhere_nothing_is_selected_and_the_note_says_why(tmp_path: Path) -> None:
    outcome = run(tmp_path, targets={})
    assert not outcome.picks
    assert outcome.selection.notes == ("no site has target rows; start one with --target-data",)
    # Nothing was released.
    assert not Ledger(tmp_path / "site-3" / "ledger.db").entries()


def test_means_are_over_as_many_rows_as_the_site_lets_out(tmp_path: Path) -> None:
    _, _, wanted = world()
    outcome = run(tmp_path, target_queries=8)
    (queries,) = (report for _, report in outcome.reports if report.values)
    # Twelve rows give two groups of five.
    assert len(queries.values) == 2 * _DIMENSION
    with pytest.raises(PrivacyError, match="a mean over 4 target rows says what each of them is like"):
        run(tmp_path / "few", targets={"site-3": wanted[:4]})


def test_no_count_is_over_fewer_rows_than_the_site_lets_out(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    counts = [count for _, report in outcome.reports for query in report.queries for count in query.counts]
    assert sum(counts) == 312
    assert all(count == 0 or count >= 5 for count in counts)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 255)), min_size=1, max_size=60), st.integers(1, 8))
def test_rows_are_told_in_groups(rows: list[tuple[int, int]], least: int) -> None:
    nearest, bins = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    own, told, order = _told(nearest, bins, np.argsort(-bins, kind="stable"), least=least)
    assert sorted(order.tolist()) == [*range(len(rows))]
    counts = np.zeros((4, BINS), dtype=int)
    np.add.at(counts, (own, told), 1)
    assert all(count == 0 or count >= min(least, len(rows)) for count in counts.ravel())
    for query in range(4):
        # What the coordinator takes from the top is what the site gives first.
        assert (np.diff(told[[row for row in order if own[row] == query]]) <= 0).all()


def test_noise_is_on_queries_and_counts_each_in_its_unit(tmp_path: Path) -> None:
    outcome = run(tmp_path, **NOISE)
    (queries,) = (report for _, report in outcome.reports if report.values)
    assert queries.values_noise_std == pytest.approx(0.5 * centroid_sensitivity(clip_norm=1.0, released=2))
    rows = [report for _, report in outcome.reports if report.queries]
    assert {len(report.queries) for report in rows} == {2}
    assert {report.noise_std for report in rows} == {0.5}
    assert 0 < len(set(outcome.rows)) <= 20
    entries = Ledger(tmp_path / "site-3" / "ledger.db").entries()
    assert [(entry.unit, entry.release, entry.noise_multiplier) for entry in entries] == [
        ("client", "means of target rows", 0.5),
        ("example", "counts of rows by similarity", 0.5),
    ]


@pytest.mark.parametrize(
    "request_",
    [
        TargetQueries(),
        TargetQueries(dimension=3),
        TargetQueries(dimension=4, values=[1.0] * 4),
        TargetQueries(dimension=3, values=[1.0] * 4),
        TargetQueries(dimension=3, values=[math.nan] * 3),
        TargetQueries(dimension=3, values=[1.0] * 3 * 257),
    ],
)
def test_a_site_takes_no_hostile_queries(request_: TargetQueries) -> None:
    with pytest.raises(TaskError, match="quer"):
        _queries(request_, 3)


SPEC = RunSpec.of(model="m", rounds=1, selection_strategy="target-features", target_queries=2, feature_dimension=3)
REQUEST = TargetQueries(dimension=3, values=[1.0, 0, 0, 0, 1, 0])


def counts(*values: int) -> list[int]:
    return [*values, *[0] * (BINS - len(values))]


@pytest.mark.parametrize(
    ("request_", "report", "fault"),
    [
        (None, TargetReport(), ""),
        (None, TargetReport(dimension=3, values=[0.5, 0, 0]), ""),
        (None, TargetReport(queries=[QueryRows(query_id=0, counts=counts(10))]), "before there are queries"),
        (None, TargetReport(dimension=4, values=[1, 0, 0, 0]), "at most 2 queries of 3 values"),
        (None, TargetReport(dimension=3, values=[1, 0]), "at most 2 queries of 3 values"),
        (None, TargetReport(dimension=3, values=[0.1] * 9), "at most 2 queries of 3 values"),
        (None, TargetReport(dimension=3, values=[math.nan, 0, 0]), "not finite"),
        (None, TargetReport(dimension=3, values=[math.inf, 0, 0]), "not finite"),
        (None, TargetReport(dimension=3, values=[2, 0, 0]), "longer than a mean"),
        (None, TargetReport(dimension=3, values=[1, 0, 0], values_noise_std=0.1), "noise that it does not ask for"),
        (None, TargetReport(values_noise_std=0.1), "noise without queries"),
        (REQUEST, TargetReport(queries=[QueryRows(query_id=1, counts=counts(4, 6))]), ""),
        (REQUEST, TargetReport(dimension=3, values=[1, 0, 0]), "were not asked for"),
        (REQUEST, TargetReport(queries=[QueryRows(query_id=2, counts=counts(10))]), "was not asked for"),
        (REQUEST, TargetReport(queries=[QueryRows(query_id=0, counts=counts(5))] * 2), "reported twice"),
        (REQUEST, TargetReport(queries=[QueryRows(query_id=0, counts=[10])]), "bins"),
        (REQUEST, TargetReport(queries=[QueryRows(query_id=0, counts=counts(11, -1))]), "does not add up"),
        (REQUEST, TargetReport(), "does not add up"),
        (REQUEST, TargetReport(queries=[QueryRows(query_id=0, counts=counts(10))], noise_std=1.0), "noise"),
    ],
)
def test_hostile_reports_are_rejected(request_: TargetQueries | None, report: TargetReport, fault: str) -> None:
    found = STRATEGIES["target-features"].check(SPEC, request_, report, rows=10)
    assert fault in found
    assert bool(fault) is bool(found)
