"""Filters: one threshold for all sites, as if all rows lay in one place, and no count that speaks of one row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from benchmarks.simulation import Outcome, Shards, select
from fedhds.errors import PrivacyError, TaskError
from fedhds.privacy.ledger import Ledger
from fedhds.spec import BINS, FILTER_SPECS, STRATEGY_SPECS, RunSpec
from fedhds.v2.selection_pb2 import FilteredRequest, ScoreHistogram, ScoreRange
from fedhds_client.selection.filters import kept_rows, put_together
from fedhds_server.selection.filters import fault_of, kept_bins

SIZES = {"site-0": 60, "site-1": 33, "site-2": 7, "site-3": 90}
FAST: dict[str, dict[str, Any]] = {"fedhds": {"reduction": "pca"}, "fedhds-aligned": {"reduction": "pca"}}
# As a run needs it that is noised.
NOISE: dict[str, Any] = {"selection_clip_norm": 1.0, "selection_noise_multiplier": 2.0, "released_centroids": 4}

Scores = dict[str, npt.NDArray[np.float64]]


def shards(seed: int = 0) -> Shards:
    rng = np.random.default_rng(seed)
    world = {}
    for site, size in SIZES.items():
        values = rng.normal(size=(size, 8))
        world[site] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return world


def drawn(seed: int = 0) -> Scores:
    """Scores whose distribution differs between sites."""
    rng = np.random.default_rng(seed)
    return {site: rng.normal(number * 0.4, 0.7, size) for number, (site, size) in enumerate(SIZES.items())}


def run(folder: Path, strategy: str = "full", filters: str = "alignment", **settings: Any) -> Outcome:
    options: dict[str, Any] = {"scores": {"alignment": drawn(), "length": lengths()}, "min_cluster_rows": 1}
    options |= {"targets": {"site-0": shards()["site-0"][:6]}} | FAST.get(strategy, {})
    return select(shards(), folder, strategy, selection_filters=filters, **(options | settings))


def lengths() -> Scores:
    return {site: 4 + scores for site, scores in drawn(1).items()}


@pytest.mark.parametrize("keep", ["25%", "70%", "99%"])
def test_the_threshold_is_the_centralized_one_up_to_a_bin(tmp_path: Path, keep: str) -> None:
    outcome, scores = run(tmp_path, filter_keep=keep), drawn()
    pooled = np.sort(np.concatenate([*scores.values()]))[::-1]
    threshold = pooled[math.ceil(float(keep[:-1]) / 100 * len(pooled) - 1e-9) - 1]
    kept = {site: set(rows) for site, rows in outcome.picks.items()}
    for site, values in scores.items():
        for row, score in enumerate(values):
            # A row that is above the centralized threshold stays, and one that is a bin below it goes.
            if score >= threshold:
                assert row in kept[site]
            elif score < threshold - FILTER_SPECS["alignment"].width:
                assert row not in kept[site]


def test_the_middle_of_the_lengths_stays(tmp_path: Path) -> None:
    outcome, scores = run(tmp_path, filters="length", filter_keep="60%"), lengths()
    pooled = np.concatenate([*scores.values()])
    low, high = np.quantile(pooled, 0.2), np.quantile(pooled, 0.8)
    width = FILTER_SPECS["length"].width
    kept = np.array([scores[site][row] for site, row in outcome.rows])
    assert low - width <= kept.min() <= low + width
    assert high - width <= kept.max() <= high + width
    assert 0.6 * len(pooled) <= len(kept) <= 0.72 * len(pooled)


@hypothesis_settings(max_examples=25)
@given(st.lists(st.integers(0, 20), min_size=BINS, max_size=BINS), st.floats(0.01, 1.0), st.booleans())
def test_no_fewer_rows_stay_than_are_to(counts: list[int], keep: float, middle: bool) -> None:
    values = np.array(counts)
    first, last = kept_bins(values, keep, keeps="middle" if middle else "high")
    assert 0 <= first <= last < BINS
    assert values[first : last + 1].sum() >= keep * values.sum() - 1e-6
    if not middle:
        assert last == BINS - 1
        # One bin more would not be needed.
        assert first == BINS - 1 or values[first + 1 :].sum() < keep * values.sum() + 1e-6 or not values[first:].sum()


@pytest.mark.parametrize("strategy", STRATEGY_SPECS)
def test_every_strategy_picks_from_what_stays_alone(tmp_path: Path, strategy: str) -> None:
    full = set(run(tmp_path / "full", filters="alignment,length", filter_keep="50%").rows)
    assert len(full) < 0.35 * sum(SIZES.values())
    settings = {} if strategy == "full" else {"selection_budget": "11"}
    outcome = run(tmp_path / "own", strategy, filters="alignment,length", filter_keep="50%", **settings)
    assert set(outcome.rows) <= full
    assert len(set(outcome.rows)) == (len(full) if strategy == "full" else 11)


def test_a_selection_per_round_has_scores_of_its_own(tmp_path: Path) -> None:
    once = run(tmp_path, "random", selection_budget="20", filter_keep="40%")
    # In the same folder, where the scores before the first round are.
    again = {"alignment": {site: -scores for site, scores in drawn().items()}, "length": lengths()}
    settings: dict[str, Any] = {"selection_budget": "20", "filter_keep": "40%", "selection_schedule": "per-round"}
    each = run(tmp_path, "random", scores=again, **settings)
    assert len(each.rows) == 20
    assert np.mean([drawn()[site][row] for site, row in once.rows]) > 0.9
    assert np.mean([drawn()[site][row] for site, row in each.rows]) < 0.4


def test_a_budget_beyond_what_stays_takes_all_of_it(tmp_path: Path) -> None:
    full = set(run(tmp_path / "full", filter_keep="10%").rows)
    assert set(run(tmp_path / "own", "random", filter_keep="10%", selection_budget="150").rows) == full


@pytest.mark.parametrize("strategy", ["random", "federated-kmeans"])
def test_the_order_of_sites_does_not_matter(tmp_path: Path, strategy: str) -> None:
    one = run(tmp_path / "one", strategy, selection_budget="9")
    other = run(tmp_path / "other", strategy, selection_budget="9", order=lambda names: names[::-1])
    assert one.picks == other.picks


def test_of_copies_within_a_site_one_stays(tmp_path: Path) -> None:
    rng, world, copies = np.random.default_rng(3), {}, {}
    for site, values in shards().items():
        again = np.concatenate([values, values[: len(values) // 2] + 1e-3 * rng.normal(size=(len(values) // 2, 8))])
        world[site] = (again / np.linalg.norm(again, axis=1, keepdims=True)).astype(np.float32)
        copies[site] = set(range(len(values), len(again)))
    share = f"{100 * sum(SIZES.values()) / sum(map(len, world.values())):.4f}%"
    outcome = select(world, tmp_path, "full", selection_filters="duplicates", filter_keep=share, min_cluster_rows=1)
    kept = set(outcome.rows)
    assert not {(site, row) for site, rows in copies.items() for row in rows} & kept
    assert len(kept) == sum(SIZES.values())


def test_without_noise_no_count_is_over_fewer_rows_than_the_site_lets_out(tmp_path: Path) -> None:
    outcome = run(tmp_path, filters="alignment,length", min_cluster_rows=5)
    reports = [report for _, report in outcome.reports if isinstance(report, ScoreHistogram)]
    assert len(reports) == 8
    for report in reports:
        assert all(count == 0 or count >= 5 for count in report.counts) or sum(report.counts) == report.counts[0]
    # A shard of too few rows says no more than their number.
    (small,) = (report for site, report in outcome.reports[:4] if site == "site-2" and sum(report.counts))
    assert sum(small.counts) == SIZES["site-2"]


@given(st.lists(st.integers(0, BINS - 1), max_size=40), st.integers(1, 9))
def test_rows_are_put_together_with_their_like(bins: list[int], least: int) -> None:
    own = put_together(bins, least=least)
    assert len(own) == len(bins)
    counts = np.bincount(own, minlength=1)
    assert all(count == 0 or count >= min(least, len(bins)) for count in counts)
    if least == 1:
        assert own.tolist() == bins
    if len(bins) >= least:
        # No order is turned round.
        order = np.argsort(bins, kind="stable")
        assert (np.diff(own[order]) >= 0).all()


def test_noise_has_the_variance_that_the_run_asks_for_and_is_in_the_ledger(tmp_path: Path) -> None:
    errors = []
    for number in range(6):
        folder = tmp_path / str(number)
        outcome = run(folder, "random", selection_budget="20", **NOISE)
        for site, report in outcome.reports:
            assert isinstance(report, ScoreHistogram)
            assert report.noise_std == 2.0
            exact = np.bincount(FILTER_SPECS["alignment"].bins(drawn()[site]), minlength=BINS)
            errors += (np.array(report.counts) - exact).tolist()
        assert 0 < len(set(outcome.rows)) <= 20
    # Rounding adds a twelfth; of 6,144 draws the variance is within 8 percent.
    assert np.var(errors) == pytest.approx(4 + 1 / 12, rel=0.08)
    assert abs(np.mean(errors)) < 0.15
    entries = Ledger(tmp_path / "0" / "site-0" / "ledger.db").entries()
    assert [(entry.unit, entry.sensitivity, entry.noise_multiplier) for entry in entries] == [("example", 1.0, 2.0)]


def test_federated_kmeans_composes_with_filters_under_noise(tmp_path: Path) -> None:
    outcome = run(tmp_path, "federated-kmeans", selection_budget="12", kmeans_iterations=2, **NOISE)
    assert 0 < len(set(outcome.rows)) <= 12
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="federated-kmeans", selection_filters="length", **NOISE)
    assert spec.selection.releases(spec) == spec.selection.strategy.releases(spec) + 1
    entries = Ledger(tmp_path / "site-0" / "ledger.db").entries()
    assert len(entries) == spec.replace(kmeans_iterations=2).selection.releases(spec.replace(kmeans_iterations=2))


def test_noise_that_hides_no_row_needs_consent(tmp_path: Path) -> None:
    weak = NOISE | {"selection_noise_multiplier": 1e-6}
    with pytest.raises(PrivacyError, match="--min-cluster-rows 1"):
        run(tmp_path, "random", min_cluster_rows=5, selection_budget="5", **weak)
    assert run(tmp_path / "agreed", "random", selection_budget="5", **weak).rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection_filters": "duplicates", **NOISE}, "noise would hide nothing"),
        ({"selection_filters": "length", "selection_strategy": "fedhds", **NOISE}, "hides single rows, but fedhds"),
        ({"selection_filters": "length", "dp_noise_multiplier": 1.0}, "filters without noise tell of rows"),
        ({"selection_filters": "length,length"}, "each once"),
        ({"selection_filters": "beauty"}, "alignment, length, duplicates"),
        ({"filter_keep": "120%"}, "a share above 0%"),
        ({"filter_keep": "7"}, "a share above 0%"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSpec.of(**{"model": "m", "rounds": 1, "selection_strategy": "random", **settings})


def histogram(**fields: Any) -> ScoreHistogram:
    return ScoreHistogram(**{"filter": "length", "counts": [10, *[0] * (BINS - 1)], **fields})


@pytest.mark.parametrize(
    ("report", "fault"),
    [
        (histogram(), ""),
        (histogram(filter="alignment"), "256 bins of the filter length"),
        (histogram(counts=[10]), "256 bins"),
        (histogram(counts=[10, *[0] * BINS]), "256 bins"),
        (histogram(counts=[11, -1, *[0] * (BINS - 2)]), "does not add up"),
        (histogram(counts=[2**62, *[0] * (BINS - 1)]), "does not add up"),
        (histogram(noise_std=1.0), "noise"),
        (histogram(noise_std=math.nan), "noise"),
    ],
)
def test_hostile_histograms_are_rejected(report: ScoreHistogram, fault: str) -> None:
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="random", selection_filters="length")
    found = fault_of(report, spec, request=FilteredRequest(filter="length"), rows=10)
    assert fault in found
    assert bool(fault) is bool(found)


@pytest.mark.parametrize(
    ("counts", "fault"),
    [
        ([12, -3, *[0] * (BINS - 2)], ""),
        ([2000, *[0] * (BINS - 1)], "counts more rows"),
        ([-2000, *[0] * (BINS - 1)], "counts more rows"),
        ([20] * BINS, "counts more rows"),
        ([-20] * BINS, "counts fewer rows"),
    ],
)
def test_hostile_histograms_under_noise_are_rejected(counts: list[int], fault: str) -> None:
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="random", selection_filters="length", **NOISE)
    found = fault_of(histogram(counts=counts, noise_std=2.0), spec, request=FilteredRequest(filter="length"), rows=10)
    assert fault in found
    assert bool(fault) is bool(found)


def test_later_steps_and_the_training_mean_the_rows_that_the_site_counted(tmp_path: Path) -> None:
    outcome = run(tmp_path, filter_keep="40%")
    ranges = outcome.selection.coresets["site-0"].ranges
    assert [each.filter for each in ranges] == ["alignment"]
    where: dict[str, Any] = {"run_id": "run", "folder": tmp_path / "site-0", "round_number": 0}
    assert tuple(kept_rows(ranges, rows=60, **where)) == outcome.picks["site-0"]
    with pytest.raises(TaskError, match="the shard has 61 rows, but had 60"):
        kept_rows(ranges, rows=61, **where)
    with pytest.raises(TaskError, match="no scores of the filter length"):
        kept_rows([ScoreRange(filter="length")], rows=60, **where)
    with pytest.raises(TaskError, match="a filter that this version does not know"):
        kept_rows([ScoreRange(filter="../secret")], rows=60, **where)
