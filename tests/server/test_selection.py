"""Inter-client selection: right groups, exact budgets, and nothing that depends on order or on bad reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.spec import RunSpec
from fedhds.v2 import selection_pb2
from fedhds_server.selection import STRATEGIES, Report, Selection, SelectionContext
from fedhds_server.selection.pca_2d import pca_2d


def context(
    rows: Mapping[str, int], budget: int | None = None, fields: Mapping[str, Any] | None = None
) -> SelectionContext:
    return SelectionContext(spec=spec_of(**(fields or {})), round_number=0, rows=rows, budget=budget)


def spec_of(strategy: str = "fedhds", **fields: object) -> RunSpec:
    return RunSpec.of(model="m", rounds=1, selection_strategy=strategy, **fields)


def report(site: str, centers: Sequence[Sequence[float]], sizes: Sequence[int] = (), *, unclustered: int = 0) -> Report:
    clusters = selection_pb2.ClusterReport(dimension=len(centers[0]) if centers else 2, unclustered=unclustered)
    for number, center in enumerate(centers):
        clusters.centroids.add(cluster_id=number, values=center, size=sizes[number] if sizes else 1)
    return Report(f"select/0/{site}", clusters)


def rows_of(reports: Mapping[str, Report]) -> dict[str, int]:
    return {
        site: report.message.unclustered + sum(centroid.size for centroid in report.message.centroids)
        for site, report in reports.items()
    }


def select(strategy: str, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
    """The decision of a strategy that needs one step only."""
    selection = STRATEGIES[strategy].select(context, reports)
    assert isinstance(selection, Selection)
    return selection


def fedhds(reports: Mapping[str, Report], budget: int | None = None, **fields: Any) -> Selection:
    return select("fedhds", context(rows_of(reports), budget, fields), reports)


def picked(selection: Selection) -> dict[tuple[str, int | None], int]:
    counts: dict[tuple[str, int | None], int] = {}
    for site, coreset in selection.coresets.items():
        assert coreset.picks.select_task_id == f"select/0/{site}"
        for pick in coreset.picks.clusters:
            assert (site, pick.cluster_id) not in counts
            counts[site, pick.cluster_id] = pick.count
        if coreset.picks.unclustered:
            counts[site, None] = coreset.picks.unclustered
    return counts


def test_full_takes_all_rows_of_every_site_that_has_some() -> None:
    selection = select("full", context({"b": 3, "a": 2, "evaluator": 0}), {})
    assert {site: coreset.WhichOneof("rows") for site, coreset in selection.coresets.items()} == {
        "a": "all",
        "b": "all",
    }


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 50), min_size=1), st.integers(1, 200))
def test_random_meets_its_budget_and_asks_no_site_for_more_than_it_has(rows: dict[str, int], budget: int) -> None:
    selection = select("random", context(rows, budget), {})
    counts = {site: coreset.random.count for site, coreset in selection.coresets.items()}
    assert sum(counts.values()) == min(budget, sum(rows.values()))
    assert all(0 < count <= rows[site] for site, count in counts.items())
    shuffled = dict(reversed(rows.items()))
    assert select("random", context(shuffled, budget), {}).coresets == selection.coresets


def test_random_with_the_budget_auto_takes_one_and_a_half_per_cent() -> None:
    assert spec_of("random").selection.budget_of(2000) == 30
    selection = select("random", context({"a": 1000, "b": 1000}, 30), {})
    assert sum(coreset.random.count for coreset in selection.coresets.values()) == 30


def test_a_site_that_declares_a_huge_number_of_rows_does_not_take_the_budget_of_random_over() -> None:
    def counts(rows: dict[str, int], budget: int) -> dict[str, int]:
        selection = select("random", context(rows, budget), {})
        return {site: coreset.random.count for site, coreset in selection.coresets.items()}

    drawn = counts({"a": 100, "b": 200, "liar": 10**8}, 60)
    assert drawn["liar"] == 30
    assert drawn["a"] + drawn["b"] == 30
    # What the others do not have it gives after all: the budget is met, and its weight is bounded in any case.
    assert counts({"a": 4, "b": 8, "liar": 10**8}, 60) == {"a": 4, "b": 8, "liar": 48}
    assert counts({"liar": 10**8}, 60) == {"liar": 60}
    # Sites of one certificate share its part.
    drawn = counts({"a": 100, "b": 200, **{f"liar/{number}": 10**7 for number in range(6)}}, 60)
    assert drawn.pop("a") + drawn.pop("b") == 30
    assert sum(drawn.values()) == 30
    assert len(drawn) > 1


def test_random_draws_differ_between_seeds_rounds_and_sites() -> None:
    rows = {"a": 100, "b": 100}
    draws = [
        select("random", SelectionContext(spec_of("random", seed=seed), number, rows, budget=50), {})
        for seed, number in ((1, 0), (1, 1), (2, 0))
    ]
    seeds = {coreset.random.seed for draw in draws for coreset in draw.coresets.values()}
    assert len(seeds) == 6


def test_the_papers_rule_takes_one_row_of_each_group_and_drops_the_loner() -> None:
    near = 0.01 * np.arange(4)
    reports = {
        "a": report("a", [(0, 0), (10, 10), (50, -50)]),
        "b": report("b", [(near[1], 0), (10 + near[1], 10)]),
        "c": report("c", [(near[2], 0), (10 + near[2], 10)]),
    }
    selection = fedhds(reports, max_weight_share=1.0)
    assert [group.members for group in selection.groups] == [
        (("a", 0), ("b", 0), ("c", 0)),
        (("a", 1), ("b", 1), ("c", 1)),
    ]
    assert picked(selection) == {("b", 0): 1, ("b", 1): 1}
    assert "1 are like no other" in selection.notes[-1]
    # By default no site gives more than half of the rows: the next nearest takes its place.
    bounded = fedhds(reports)
    assert bounded.groups[0] == selection.groups[0]
    ((site, cluster),) = bounded.groups[1].winners
    assert (site != "b", cluster) == (True, 1)


def test_clusters_of_which_no_two_are_alike_are_all_kept() -> None:
    reports = {"a": report("a", [(0, 0)]), "b": report("b", [(100, 0)])}
    assert picked(fedhds(reports)) == {("a", 0): 1, ("b", 0): 1}


def test_a_budget_merges_the_likest_clusters_first_and_keeps_the_loner() -> None:
    reports = {
        "a": report("a", [(0, 0), (10, 10), (50, -50)], (5, 5, 5)),
        "b": report("b", [(0.01, 0), (10.01, 10)], (5, 5)),
        "c": report("c", [(0.02, 0), (10.02, 10)], (5, 5)),
    }
    assert picked(fedhds(reports, 3)) == {("b", 0): 1, ("b", 1): 1, ("a", 2): 1}


def test_a_budget_beyond_the_clusters_takes_more_of_each_in_proportion_and_of_the_noise() -> None:
    reports = {"a": report("a", [(0, 0), (9, 9)], (61, 21), unclustered=20)}
    assert picked(fedhds(reports, 12)) == {("a", 0): 1 + 6, ("a", 1): 1 + 2, ("a", None): 2}


# What one site says of its rows does not give it the selection.

SHARED = {"feature_dimension": 2, "selection_strategy": "federated-kmeans"}


def last_step(clusters: Mapping[str, Sequence[tuple[int, int, float]]], budget: int) -> Selection:
    """The decision on (cluster, count, nearest) of every site after the last step of federated k-means."""
    spec = RunSpec.of(model="m", rounds=1, **SHARED)
    reports, rows = {}, {}
    for site, triples in clusters.items():
        stats = selection_pb2.KMeansStats(dimension=2)
        for number, count, nearest in triples:
            stats.clusters.add(cluster_id=number, count=count, nearest=nearest)
        reports[site] = Report(f"select/0/{site}", stats)
        rows[site] = sum(count for _, count, _ in triples)
    centers = selection_pb2.KMeansCenters(dimension=2, values=[0.5] * 12, last=True, target_count=budget)
    strategy = STRATEGIES["federated-kmeans"]
    selection = strategy.select(SelectionContext(spec, 0, rows, budget, 9, centers), reports)
    assert isinstance(selection, Selection)
    return selection


def rows_by_site(selection: Selection) -> dict[str, int]:
    counts: dict[str, int] = {}
    for (site, _), count in picked(selection).items():
        counts[site] = counts.get(site, 0) + count
    return counts


def test_a_site_that_claims_to_be_nearest_everywhere_does_not_take_every_pick() -> None:
    honest = [(number, 800 // 6 + 1, 0.3) for number in range(6)]
    liar = [(number, 2 if number < 2 else 1, 0.0) for number in range(6)]
    assert rows_by_site(last_step({"honest": honest, "liar": liar}, 6)) == {"honest": 3, "liar": 3}
    # Names of one certificate share its bound.
    names = {f"liar/{name}": liar for name in "xyz"}
    counts = rows_by_site(last_step({"honest": honest, **names}, 6))
    assert counts.pop("honest") == 3
    assert sum(counts.values()) == 3
    # Where the others have no rows left, the budget is met all the same.
    assert rows_by_site(last_step({"few": [(0, 1, 0.3)], "liar": liar}, 6)) == {"few": 1, "liar": 5}


def test_centroids_along_one_line_do_not_shut_the_others_out() -> None:
    values = np.linspace(-1, 1, 20)
    liar = report("liar", [(value, 0) for value in values], [2] * 20)
    honest = report("honest", [(0.01 * number, 0.5) for number in range(20)], [40] * 20)
    selection = select("fedhds-aligned", context({"honest": 800, "liar": 40}, 10), {"honest": honest, "liar": liar})
    assert rows_by_site(selection) == {"honest": 5, "liar": 5}


@st.composite
def federations(draw: st.DrawFn) -> dict[str, Report]:
    """Sites with clusters at few places, so that many are equal, and noise."""
    reports = {}
    for site in draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True)):
        sizes = draw(st.lists(st.integers(1, 6), max_size=5))
        centers = [(draw(st.integers(0, 3)), draw(st.integers(0, 2))) for _ in sizes]
        reports[site] = report(site, centers, sizes, unclustered=draw(st.integers(0, 4)))
    return reports


@settings(max_examples=200, deadline=None)
@given(federations(), st.integers(1, 60))
def test_a_budget_is_met_exactly_wherever_the_rows_allow(reports: dict[str, Report], budget: int) -> None:
    counts = picked(fedhds(reports, budget))
    assert sum(counts.values()) == min(budget, sum(rows_of(reports).values()))
    for (site, cluster), count in counts.items():
        clusters = reports[site].message
        assert 0 < count <= (clusters.unclustered if cluster is None else clusters.centroids[cluster].size)


@settings(max_examples=100, deadline=None)
@given(federations(), st.one_of(st.none(), st.integers(1, 60)))
def test_the_order_in_which_sites_answer_does_not_matter(reports: dict[str, Report], budget: int | None) -> None:
    selection = fedhds(reports, budget)
    assert fedhds(dict(reversed(reports.items())), budget) == selection


def test_under_noise_a_budget_is_an_upper_bound_and_no_count_is_asked_for() -> None:
    noised = {"selection_clip_norm": 1.0, "selection_noise_multiplier": 1.0, "max_weight_share": 1.0}
    reports = {"a": report("a", [(0, 0), (9, 9)], (0, 0)), "b": report("b", [(0, 1)], (0,))}
    for budget, rows in ((2, 2), (50, 3)):
        assert sum(picked(select("fedhds", context({"a": 8, "b": 8}, budget, noised), reports)).values()) == rows


NARROW = selection_pb2.ClusterReport(dimension=2, centroids=[selection_pb2.Centroid(values=[1], size=4)])
TWICE = selection_pb2.ClusterReport(dimension=2, centroids=2 * [selection_pb2.Centroid(values=[1, 2], size=2)])
LATER = selection_pb2.ClusterReport(
    dimension=2, centroids=[selection_pb2.Centroid(cluster_id=1, values=[0, 1], size=4)]
)
MANY = report("z", 17 * [(0, 0)], 17 * [1]).message
PLAIN: dict[str, Any] = {}
NOISED: dict[str, Any] = {
    "selection_clip_norm": 1.0,
    "selection_noise_multiplier": 1.0,
    "released_centroids": 2,
}
# Twice the clipping norm for each of the centroids, under replacement of the whole shard.
STD = 2 * math.sqrt(2)


def noised_report(*, centroids: int = 2, noise_std: float = STD, size: int = 0, unclustered: int = 0) -> Any:
    message = report("z", centroids * [(0, 0)], centroids * [size], unclustered=unclustered).message
    message.noise_std = noise_std
    return message


@pytest.mark.parametrize(
    ("message", "rows", "fields", "words"),
    [
        (NARROW, 4, PLAIN, "do not have the 2 values"),
        (report("z", [(1, 2, 3)], (4,)).message, 4, PLAIN, "do not have the 2 values"),
        (report("z", [(float("nan"), 0)], (4,)).message, 4, PLAIN, "not finite"),
        (report("z", [(float("inf"), 0)], (4,)).message, 4, PLAIN, "not finite"),
        (report("z", [(0, 0)], (4,)).message, 5, PLAIN, "do not add up to the 5 rows"),
        (report("z", [(0, 0)], (4,), unclustered=2).message, 5, PLAIN, "do not add up to the 5 rows"),
        (report("z", [(0, 0)], (4,)).message, 0, PLAIN, "do not add up to the 0 rows"),
        (TWICE, 4, PLAIN, "twice"),
        (MANY, 16, PLAIN, "more clusters than rows"),
        (LATER, 4, PLAIN, "not numbered from 0"),
        (report("z", [(0, 0), (1, 0)], (4, 1)).message, 5, PLAIN, "fewer than 2 rows"),
        (report("z", [(0, 0), (1, 0)], (4, 0)).message, 4, PLAIN, "fewer than 2 rows"),
        (noised_report(), 4, PLAIN, "noise that the run does not ask for"),
        (report("z", [(9, 0)], (4,)).message, 4, {"selection_clip_norm": 1.0}, "longer than a mean"),
        (report("z", [(1e30, 0), (0, 0)], (0, 0)).message, 4, NOISED, "longer than a mean"),
        (report("z", [(0, 0)], (4,)).message, 4, NOISED, "which the noise does not cover"),
        (noised_report(unclustered=4), 4, NOISED, "which the noise does not cover"),
        (noised_report(noise_std=0), 4, NOISED, "lacks the noise"),
        (noised_report(noise_std=STD / 2), 4, NOISED, "lacks the noise"),
        (noised_report(noise_std=float("nan")), 4, NOISED, "lacks the noise"),
        (noised_report(centroids=1), 4, NOISED, "on exactly 2 centroids"),
        (noised_report(centroids=3), 4, NOISED, "on exactly 2 centroids"),
    ],
)
def test_a_report_that_cannot_be_right_is_refused(
    message: selection_pb2.ClusterReport, rows: int, fields: dict[str, Any], words: str
) -> None:
    for spec in (spec_of(**fields), spec_of("fedhds-aligned", feature_dimension=2, **fields)):
        assert words in STRATEGIES[spec.selection.strategy.name].check(spec, None, message, rows=rows)


def test_a_report_that_can_be_right_is_taken() -> None:
    check = STRATEGIES["fedhds"].check
    assert check(spec_of(), None, report("z", [(0, 0), (1, 2)], (4, 2), unclustered=1).message, rows=7) == ""
    assert check(spec_of(), None, report("z", [], unclustered=3).message, rows=3) == ""
    assert check(spec_of(**NOISED), None, noised_report(), rows=1) == ""


@pytest.mark.parametrize(("strategy", "dimension"), [("fedhds", 2), ("fedhds-aligned", 7)])
def test_centroids_have_the_dimension_of_their_space(strategy: str, dimension: int) -> None:
    spec = spec_of(strategy, feature_dimension=7)
    for number in (2, 7):
        fault = STRATEGIES[strategy].check(spec, None, report("z", [number * (0.3,)], (4,)).message, rows=4)
        assert (fault == "") == (number == dimension)


def test_no_reports_give_an_empty_selection() -> None:
    assert fedhds({}).coresets == {}
    assert fedhds({"a": report("a", [])}, 5).coresets == {}


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 1), (5, 1), (2, 7), (40, 2), (30, 300), (700, 600)])
def test_centroids_are_drawn_the_same_way_every_time(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(0).normal(size=shape)
    drawn = pca_2d(points)
    assert drawn.shape == (shape[0], 2)
    assert np.isfinite(drawn).all()
    assert (pca_2d(points.copy()) == drawn).all()


def test_what_lies_in_a_plane_keeps_its_distances_and_equal_centroids_share_a_place() -> None:
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(20, 2)) @ np.linalg.qr(rng.normal(size=(9, 2)))[0].T + 5
    gaps = np.linalg.norm(flat[:, None] - flat, axis=2)
    drawn = pca_2d(flat)
    assert np.allclose(np.linalg.norm(drawn[:, None] - drawn, axis=2), gaps)
    assert (pca_2d(np.ones((4, 9))) == 0).all()
    assert (pca_2d(np.repeat(flat[:2], 3, axis=0)).round(9) == np.repeat(pca_2d(flat[:2]), 3, axis=0).round(9)).all()
