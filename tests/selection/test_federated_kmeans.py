"""Federated k-means: exactly the centralized coreset without noise, and nothing exact with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.simulation import Shards, select
from fedhds.errors import PrivacyError
from fedhds.kmeans import SUM_UNIT, splitting_passes, total_passes
from fedhds.privacy.ledger import Ledger
from fedhds.privacy.mechanisms import cluster_sensitivity, gaussian_epsilon
from fedhds.spec import RunSpec
from fedhds.v2 import selection_pb2
from fedhds_client.features.assignment import assign
from fedhds_client.features.extraction import Features
from fedhds_client.selection import STRATEGIES, SelectionContext
from fedhds_client.selection.private_reporter import PrivateReporter
from fedhds_server.selection.kmeans_stats import fault_of

FloatArray = npt.NDArray[np.float64]


def pool(seed: int, sizes: tuple[int, ...] = (70, 40, 1, 55, 90)) -> Shards:
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(12, 16))
    shards = {}
    for number, size in enumerate(sizes):
        values = topics[rng.integers(0, 12, size)] + 0.4 * rng.normal(size=(size, 16))
        shards[f"site-{number}"] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return shards


def central_kmeans(rows: FloatArray, centers: FloatArray, passes: int) -> list[FloatArray]:
    """Plain Lloyd on pooled rows in float64, without any of the project's code; the centers after every pass."""
    trace = []
    for _ in range(passes):
        labels = ((rows[:, None] - centers[None]) ** 2).sum(axis=2).argmin(axis=1)
        assert len(np.unique(labels)) == len(centers), "the reference does not fill empty clusters"
        centers = np.stack([rows[labels == label].mean(axis=0) for label in range(len(centers))])
        trace.append(centers)
    return trace


def nearest_rows(shards: Shards, centers: FloatArray) -> set[tuple[str, int]]:
    """Per center the nearest of the rows that belong to it, over all sites."""
    keys = [(site, row) for site in sorted(shards) for row in range(len(shards[site]))]
    rows = np.concatenate([shards[site] for site in sorted(shards)]).astype(np.float64)
    squares = ((rows[:, None] - centers[None]) ** 2).sum(axis=2)
    labels = squares.argmin(axis=1)
    picks = set()
    for label in range(len(centers)):
        members = np.flatnonzero(labels == label)
        picks.add(min((squares[row, label], keys[row]) for row in members)[1])
    return picks


@pytest.mark.parametrize("seed", range(6))
def test_without_noise_centers_and_picks_are_those_of_centralized_kmeans(tmp_path: Path, seed: int) -> None:
    shards = pool(seed)
    wanted, passes = 9, 4
    outcome = select(shards, tmp_path, "federated-kmeans", selection_budget=str(wanted), kmeans_iterations=passes)
    splitting = splitting_passes(wanted)
    assert len(outcome.centers) + 1 == total_passes(wanted, passes)
    start, *found = outcome.centers[splitting - 1 :]
    assert len(start) == wanted
    rows = np.concatenate([shards[site] for site in sorted(shards)]).astype(np.float64)
    expected = central_kmeans(rows, start.astype(np.float64), passes)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert set(outcome.rows) == nearest_rows(shards, expected[-1])


def test_one_site_with_all_rows_finds_what_many_sites_find(tmp_path: Path) -> None:
    shards = pool(1)
    whole = {"all": np.concatenate([shards[site] for site in sorted(shards)])}
    many = select(shards, tmp_path / "many", "federated-kmeans", selection_budget="9")
    one = select(whole, tmp_path / "one", "federated-kmeans", selection_budget="9")
    for mine, theirs in zip(many.centers, one.centers, strict=True):
        assert np.array_equal(mine, theirs)
    offsets = dict(zip(sorted(shards), np.cumsum([0, *(len(shards[site]) for site in sorted(shards))]), strict=False))
    assert {int(offsets[site]) + row for site, row in many.rows} == {row for _, row in one.rows}


@pytest.mark.parametrize("leaves_in", [1, 4, 8])
def test_who_drops_out_is_left_out_of_later_sums_and_picks(tmp_path: Path, leaves_in: int) -> None:
    shards = pool(3)
    wanted, passes = 6, 5
    outcome = select(
        shards,
        tmp_path,
        "federated-kmeans",
        selection_budget=str(wanted),
        kmeans_iterations=passes,
        leaves={"site-4": leaves_in},
    )
    rest = {site: values for site, values in shards.items() if site != "site-4"}
    answered = [site for site, _ in outcome.reports]
    assert answered.count("site-4") == leaves_in
    assert {site for site, _ in outcome.rows} <= set(rest)
    # From the last pass that it took part in, what follows is Lloyd on the others' rows.
    start = outcome.centers[splitting_passes(wanted) - 1 :]
    if leaves_in <= splitting_passes(wanted):
        rows = np.concatenate([rest[site] for site in sorted(rest)]).astype(np.float64)
        expected = central_kmeans(rows, start[0].astype(np.float64), passes)
        for mine, theirs in zip(start[1:], expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
        assert set(outcome.rows) == nearest_rows(rest, expected[-1])
    assert len(outcome.rows) == wanted


@pytest.mark.slow
def test_of_equally_near_rows_the_seed_decides_and_no_name_wins_every_time(tmp_path: Path) -> None:
    row = np.full((1, 16), 0.25, dtype=np.float32)
    shards = {name: np.tile(row, (3, 1)) for name in "cab"}
    winners = set()
    for seed in range(8):
        one, again = (
            select(shards, tmp_path / f"{seed}-{n}", "federated-kmeans", selection_budget="1", seed=seed)
            for n in range(2)
        )
        assert one.rows == again.rows
        ((site, first),) = one.rows
        assert first == 0
        winners.add(site)
    assert len(winners) > 1


NOISE: dict[str, Any] = {
    "selection_clip_norm": 1.0,
    "selection_noise_multiplier": 0.7,
    "released_centroids": 4,
    "kmeans_iterations": 3,
}


def test_under_noise_every_cluster_is_noised_no_distance_leaves_and_the_ledger_has_all_passes(
    tmp_path: Path,
) -> None:
    shards = pool(2)
    outcome = select(shards, tmp_path, "federated-kmeans", selection_budget="10", **NOISE)
    passes = total_passes(4, 3)
    centers = [1, *(len(found) for found in outcome.centers)]
    for site in shards:
        reports = [report for name, report in outcome.reports if name == site]
        assert len(reports) == passes
        for report, number in zip(reports, centers, strict=True):
            assert isinstance(report, selection_pb2.KMeansStats)
            assert [cluster.cluster_id for cluster in report.clusters] == list(range(number))
            assert not any(cluster.HasField("nearest") for cluster in report.clusters)
            assert report.noise_std == pytest.approx(0.7 * math.sqrt(2))
        ledger = Ledger(tmp_path / site / "ledger.db").account(site, lambda: [b"row"])
        entries = ledger.entries()
        assert [(entry.unit, entry.release) for entry in entries] == [("example", "cluster statistics")] * passes
        expected = gaussian_epsilon(noise_multiplier=0.7, delta=1e-5, releases=passes)
        assert ledger.spent("run", delta=1e-5, unit="example") == pytest.approx(expected)
        # Nothing of the client's unit was released, and the two never mix.
        assert ledger.spent("run", delta=1e-5) == 0.0


def test_one_row_moves_sums_and_counts_by_no_more_than_the_stated_sensitivity() -> None:
    rng = np.random.default_rng(0)
    values = (3 * rng.normal(size=(200, 16))).astype(np.float32)
    centers = rng.normal(size=(7, 16))
    norm = 0.8
    whole = assign(Features(np.arange(200), values), centers, norm=norm)
    worst = 0.0
    for left_out in range(200):
        kept = np.delete(np.arange(200), left_out)
        less = assign(Features(kept, values[kept]), centers, norm=norm)
        sums = (whole.sums - less.sums) / SUM_UNIT
        worst = max(worst, float(np.sqrt((sums**2).sum() + ((whole.counts - less.counts) ** 2).sum())))
    assert worst <= cluster_sensitivity(clip_norm=norm)
    assert worst > 0.99 * cluster_sensitivity(clip_norm=norm)


@pytest.mark.slow
def test_noise_has_the_stated_deviation_and_is_drawn_again_for_every_site(tmp_path: Path) -> None:
    shards = {f"site-{number}": np.zeros((1, 64), dtype=np.float32) for number in range(30)}
    outcome = select(
        shards,
        tmp_path,
        "federated-kmeans",
        selection_budget="1",
        selection_clip_norm=1.0,
        selection_noise_multiplier=2.0,
        released_centroids=1,
    )
    first = [report for _, report in outcome.reports][:30]
    values = np.array([list(cluster.sums) for report in first for cluster in report.clusters]) / SUM_UNIT
    assert values.std() == pytest.approx(2 * math.sqrt(2), rel=0.1)
    assert len(np.unique(values)) == values.size


def test_without_consent_nothing_exact_is_released(tmp_path: Path) -> None:
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="federated-kmeans", feature_dimension=4)
    account = Ledger(tmp_path / "ledger.db").account("rows", lambda: [b"row"])
    reporter = PrivateReporter("ward", tmp_path, account, "run", spec)

    def features() -> Features:
        raise AssertionError("no work before the refusal")

    with pytest.raises(PrivacyError, match="--allow-exact-kmeans-sums"):
        STRATEGIES["federated-kmeans"].report(SelectionContext("select/0/ward", spec, 5, features, reporter))
    assert reporter.account.entries() == []


def test_a_task_that_comes_again_gets_the_same_bytes(tmp_path: Path) -> None:
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="federated-kmeans", feature_dimension=4, **NOISE)
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    account = Ledger(tmp_path / "ledger.db").account("rows", lambda: [b"row"])
    reporter = PrivateReporter("ward", tmp_path, account, "run", spec)
    context = SelectionContext("select/0/ward", spec, 6, lambda: Features(np.arange(6), values), reporter)
    one, again = (STRATEGIES["federated-kmeans"].report(context) for _ in range(2))
    assert one.SerializeToString() == again.SerializeToString()
    assert len(reporter.account.entries()) == 1


# What the coordinator refuses.

STD = 0.7 * math.sqrt(2)
GIVEN = selection_pb2.KMeansCenters(dimension=2, values=[0, 0, 1, 1], target_count=2, last=True)


def report_of(
    *clusters: tuple[int, int, list[int]], nearest: float | None = None, noise_std: float = 0
) -> selection_pb2.KMeansStats:
    report = selection_pb2.KMeansStats(dimension=2, noise_std=noise_std)
    for cluster_id, count, sums in clusters:
        report.clusters.add(cluster_id=cluster_id, count=count, sums=sums, nearest=nearest)
    return report


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (selection_pb2.KMeansStats(dimension=3), "3 values"),
        (report_of((0, 2, [0, 0]), (0, 1, [0, 0])), "twice"),
        (report_of((2, 3, [0, 0])), "no center"),
        (report_of((0, 3, [0])), "another number of values"),
        (report_of((0, 2, [0, 0])), "do not add up to the 3 rows"),
        (report_of((0, 3, [0, 0]), (1, 0, [0, 0])), "without rows"),
        (report_of((0, 3, [0, 0]), noise_std=1.0), "does not ask for"),
        (report_of((0, 3, [4 * SUM_UNIT, 0])), "larger than its rows"),
        (report_of((0, 3, [-(2**63), 0])), "larger than its rows"),
        # Each value could be, but no three rows of length 1 have a sum of that length.
        (report_of((0, 3, [3 * SUM_UNIT, 3 * SUM_UNIT])), "larger than its rows"),
        (report_of((0, 3, [0, 0])), "lacks the distance"),
        (report_of((0, 3, [0, 0]), nearest=-1.0), "does not fit"),
        (report_of((0, 3, [0, 0]), nearest=math.nan), "does not fit"),
        (report_of((0, 3, [0, 0]), nearest=0.0), "does not fit"),
        # Of one row, the distance follows from its sum; the nearest of several is no farther than their mean.
        (report_of((0, 2, [0, 0]), (1, 1, [0, SUM_UNIT]), nearest=0.9), "does not fit"),
        (report_of((1, 3, [3 * SUM_UNIT, 0]), nearest=1.1), "does not fit"),
    ],
)
def test_a_report_that_cannot_be_right_is_refused(bad: selection_pb2.KMeansStats, words: str) -> None:
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="federated-kmeans", feature_dimension=2)
    assert words in fault_of(bad, spec, centers=GIVEN, rows=3)
    for good in (report_of((0, 3, [SUM_UNIT, -SUM_UNIT]), nearest=1), report_of((1, 3, [3 * SUM_UNIT, 0]), nearest=1)):
        assert fault_of(good, spec, centers=GIVEN, rows=3) == ""


def test_distances_that_were_not_asked_for_are_refused() -> None:
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="federated-kmeans", feature_dimension=2)
    earlier = selection_pb2.KMeansCenters(dimension=2, values=[0, 0, 1, 1], target_count=2)
    report = report_of((0, 3, [0, 0]), nearest=1)
    assert "not asked for" in fault_of(report, spec, centers=earlier, rows=3)
    report.clusters[0].ClearField("nearest")
    assert fault_of(report, spec, centers=earlier, rows=3) == ""


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (report_of((0, 3, [0, 0]), (1, 0, [0, 0])), "lacks the noise"),
        (report_of((0, 3, [0, 0]), (1, 0, [0, 0]), noise_std=STD / 2), "lacks the noise"),
        # No cluster of any site would exceed such a noise.
        (report_of((0, 3, [0, 0]), (1, 0, [0, 0]), noise_std=1000 * STD), "lacks the noise"),
        (report_of((0, 3, [0, 0]), noise_std=STD), "every cluster"),
        (report_of((0, 3, [0, 0]), (1, 0, [0, 0]), noise_std=STD, nearest=0.5), "lacks the noise"),
        (report_of((0, 300, [0, 0]), (1, 0, [0, 0]), noise_std=STD), "count is larger"),
        (report_of((0, 14, [0, 0]), (1, 14, [0, 0]), noise_std=STD), "too far from the 3 rows"),
        (report_of((0, 3, [40 * SUM_UNIT, 0]), (1, 0, [0, 0]), noise_std=STD), "a sum is larger"),
        (report_of((0, 3, [0, 0]), (1, 0, [0, 0]), noise_std=math.inf), "lacks the noise"),
    ],
)
def test_under_noise_other_reports_are_refused(bad: selection_pb2.KMeansStats, words: str) -> None:
    noise = {"selection_clip_norm": 1.0, "selection_noise_multiplier": 0.7}
    spec = RunSpec.of(model="m", rounds=1, selection_strategy="federated-kmeans", feature_dimension=2, **noise)
    assert words in fault_of(bad, spec, centers=GIVEN, rows=3)
    good = report_of((0, 3, [9 * SUM_UNIT, 0]), (1, -2, [0, 0]), noise_std=STD)
    assert fault_of(good, spec, centers=GIVEN, rows=3) == ""
