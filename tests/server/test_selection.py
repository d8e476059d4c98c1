"""Inter-client selection: right groups, exact budgets, and nothing that depends on order or on bad reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.spec import RunSpec
from fedhds.v2 import selection_pb2
from fedhds_server.selection import STRATEGIES, Report, Selection, SelectionContext
from fedhds_server.selection.pca_2d import plane


def context(
    rows: Mapping[str, int], budget: int | None = None, fields: Mapping[str, object] | None = None
) -> SelectionContext:
    spec = RunSpec.model_validate({"model": "m", "rounds": 1, **(fields or {})})
    return SelectionContext(seed=spec.seed, round=0, rows=rows, budget=budget, spec=spec)


def report(site: str, centers: Sequence[Sequence[float]], sizes: Sequence[int] = (), *, unclustered: int = 0) -> Report:
    clusters = selection_pb2.ClusterReport(dimension=len(centers[0]) if centers else 2, unclustered=unclustered)
    for number, center in enumerate(centers):
        clusters.centroids.add(cluster=number, values=center, size=sizes[number] if sizes else 1)
    return Report(f"select/0/{site}", clusters)


def rows_of(reports: Mapping[str, Report]) -> dict[str, int]:
    return {
        site: at.clusters.unclustered + sum(centroid.size for centroid in at.clusters.centroids)
        for site, at in reports.items()
    }


def select(strategy: str, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
    """The decision of a strategy that needs one pass only."""
    chosen = STRATEGIES[strategy].select(context, reports)
    assert isinstance(chosen, Selection)
    return chosen


def fedhds(reports: Mapping[str, Report], budget: int | None = None) -> Selection:
    return select("fedhds", context(rows_of(reports), budget), reports)


def picked(selection: Selection) -> dict[tuple[str, int | None], int]:
    counts: dict[tuple[str, int | None], int] = {}
    for site, coreset in selection.coresets.items():
        assert coreset.picks.select_task_id == f"select/0/{site}"
        for pick in coreset.picks.clusters:
            assert (site, pick.cluster) not in counts
            counts[site, pick.cluster] = pick.count
        if coreset.picks.unclustered:
            counts[site, None] = coreset.picks.unclustered
    return counts


def test_full_takes_all_rows_of_every_site_that_has_some() -> None:
    chosen = select("full", context({"b": 3, "a": 2, "evaluator": 0}), {})
    assert {site: coreset.WhichOneof("rows") for site, coreset in chosen.coresets.items()} == {"a": "all", "b": "all"}


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 50), min_size=1), st.integers(1, 200))
def test_random_meets_its_budget_and_asks_no_site_for_more_than_it_has(rows: dict[str, int], budget: int) -> None:
    chosen = select("random", context(rows, budget), {})
    counts = {site: coreset.random.count for site, coreset in chosen.coresets.items()}
    assert sum(counts.values()) == min(budget, sum(rows.values()))
    assert all(0 < count <= rows[site] for site, count in counts.items())
    shuffled = dict(reversed(rows.items()))
    assert select("random", context(shuffled, budget), {}).coresets == chosen.coresets


def test_random_with_the_budget_auto_takes_one_and_a_half_per_cent() -> None:
    assert RunSpec.of(model="m", rounds=1, selection_strategy="random").budget_of(2000) == 30
    chosen = select("random", context({"a": 1000, "b": 1000}, 30), {})
    assert sum(coreset.random.count for coreset in chosen.coresets.values()) == 30


def test_a_site_that_declares_a_huge_number_of_rows_does_not_take_the_budget_of_random_over() -> None:
    def counts(rows: dict[str, int], budget: int) -> dict[str, int]:
        chosen = select("random", context(rows, budget), {})
        return {site: coreset.random.count for site, coreset in chosen.coresets.items()}

    drawn = counts({"a": 100, "b": 200, "liar": 10**8}, 60)
    assert drawn["liar"] == 30
    assert drawn["a"] + drawn["b"] == 30
    # What the others do not have it gives after all: the budget is met, and its weight is bounded in any case.
    assert counts({"a": 4, "b": 8, "liar": 10**8}, 60) == {"a": 4, "b": 8, "liar": 48}
    assert counts({"liar": 10**8}, 60) == {"liar": 60}


def test_random_draws_differ_between_seeds_rounds_and_sites() -> None:
    rows = {"a": 100, "b": 100}
    spec = RunSpec.of(model="m", rounds=1)
    draws = [
        select("random", SelectionContext(seed=seed, round=number, rows=rows, budget=50, spec=spec), {})
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
    chosen = fedhds(reports)
    assert [group.members for group in chosen.groups] == [
        (("a", 0), ("b", 0), ("c", 0)),
        (("a", 1), ("b", 1), ("c", 1)),
    ]
    assert picked(chosen) == {("b", 0): 1, ("b", 1): 1}
    assert "1 are like no other" in chosen.notes[-1]


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
        clusters = reports[site].clusters
        assert 0 < count <= (clusters.unclustered if cluster is None else clusters.centroids[cluster].size)


@settings(max_examples=100, deadline=None)
@given(federations(), st.one_of(st.none(), st.integers(1, 60)))
def test_the_order_in_which_sites_answer_does_not_matter(reports: dict[str, Report], budget: int | None) -> None:
    chosen = fedhds(reports, budget)
    assert fedhds(dict(reversed(reports.items())), budget) == chosen


def test_under_noise_a_budget_is_an_upper_bound_and_no_count_is_asked_for() -> None:
    noised: dict[str, object] = {"clip_norm": 1.0, "noise_multiplier": 1.0}
    reports = {"a": report("a", [(0, 0), (9, 9)], (0, 0)), "b": report("b", [(0, 1)], (0,))}
    for budget, rows in ((2, 2), (50, 3)):
        assert sum(picked(select("fedhds", context({"a": 8, "b": 8}, budget, noised), reports)).values()) == rows


NARROW = selection_pb2.ClusterReport(dimension=2, centroids=[selection_pb2.Centroid(values=[1], size=4)])
TWICE = selection_pb2.ClusterReport(dimension=2, centroids=2 * [selection_pb2.Centroid(values=[1, 2], size=2)])


@pytest.mark.parametrize(
    ("bad", "rows", "words"),
    [
        (Report("select/0/z", NARROW), 4, "another number"),
        (report("z", [(1, 2, 3)], (4,)), 4, "3 values"),
        (report("z", [(float("nan"), 0)], (4,)), 4, "not finite"),
        (report("z", [(0, 0)], (4,)), 5, "add up"),
        (report("z", [(0, 0)], (4,)), 0, "no rows"),
        (Report("select/0/z", TWICE), 4, "twice"),
    ],
)
def test_a_report_that_cannot_be_right_is_left_out_with_a_note(bad: Report, rows: int, words: str) -> None:
    reports = {"a": report("a", [(0, 0)], (4,)), "z": bad}
    chosen = select("fedhds", context({"a": 4, "z": rows}), reports)
    assert set(chosen.coresets) == {"a"}
    assert words in chosen.notes[0]
    assert "site z" in chosen.notes[0]


def test_counts_under_noise_are_refused() -> None:
    noised: dict[str, object] = {"clip_norm": 1.0, "noise_multiplier": 1.0}
    chosen = select("fedhds", context({"a": 4}, None, noised), {"a": report("a", [(0, 0)], (4,))})
    assert not chosen.coresets
    assert "does not cover" in chosen.notes[0]


def test_a_site_with_centroids_of_another_size_does_not_shut_the_others_out() -> None:
    reports = {"a": report("a", [(1, 2, 3)], (4,)), "b": report("b", [(0, 0)], (4,)), "c": report("c", [(0, 1)], (4,))}
    chosen = fedhds(reports)
    assert set(chosen.coresets) == {"b", "c"}
    assert "site a is left out" in chosen.notes[0]


def test_no_reports_give_an_empty_selection() -> None:
    assert fedhds({}).coresets == {}
    assert fedhds({"a": report("a", [])}, 5).coresets == {}


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 1), (5, 1), (2, 7), (40, 2), (30, 300), (700, 600)])
def test_centroids_are_drawn_the_same_way_every_time(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(0).normal(size=shape)
    drawn = plane(points)
    assert drawn.shape == (shape[0], 2)
    assert np.isfinite(drawn).all()
    assert (plane(points.copy()) == drawn).all()


def test_what_lies_in_a_plane_keeps_its_distances_and_equal_centroids_share_a_place() -> None:
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(20, 2)) @ np.linalg.qr(rng.normal(size=(9, 2)))[0].T + 5
    gaps = np.linalg.norm(flat[:, None] - flat, axis=2)
    drawn = plane(flat)
    assert np.allclose(np.linalg.norm(drawn[:, None] - drawn, axis=2), gaps)
    assert (plane(np.ones((4, 9))) == 0).all()
    assert (plane(np.repeat(flat[:2], 3, axis=0)).round(9) == np.repeat(plane(flat[:2]), 3, axis=0).round(9)).all()
