"""Every strategy, both halves together: exact budgets, rows that exist, no order, no surprises in small shards."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulation
from benchmarks.simulation import Outcome, Shards
from fedhds.spec import STRATEGY_SPECS
from fedhds.spec.strategies import TargetSpec
from fedhds.v2 import selection_pb2

STRATEGIES = tuple(STRATEGY_SPECS)
BUDGETED = [name for name in STRATEGIES if name != "full"]
REPORTING = [name for name, spec in STRATEGY_SPECS.items() if spec.privacy_unit is not None]
# A parameter belongs to some strategies only.
FAST: dict[str, dict[str, Any]] = {
    "fedhds": {"reduction": "pca"},
    "fedhds-aligned": {"reduction": "pca"},
    "federated-kmeans": {"kmeans_iterations": 2},
}


def world(sizes: list[int], kind: str, seed: int = 0) -> Shards:
    """Features of norm 1, as in the shared space, of sites with so many rows."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(5, 8))
    shards = {}
    for number, size in enumerate(sizes):
        if kind == "identical":
            values = np.tile(topics[0], (size, 1))
        elif kind == "one topic":
            values = topics[0] + 0.05 * rng.normal(size=(size, 8))
        elif kind == "topics":
            values = topics[rng.integers(0, 5, size)] + 0.01 * rng.normal(size=(size, 8))
        else:
            values = rng.normal(size=(size, 8))
        shards[f"site-{number}"] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return shards


def select(shards: Shards, folder: Path, strategy: str, **settings: Any) -> Outcome:
    """As in the simulation; a targeted strategy looks for six rows, which the first site that has any has."""
    if issubclass(STRATEGY_SPECS[strategy], TargetSpec):
        wanted = np.random.default_rng(5).normal(size=(6, next(iter(shards.values())).shape[1]))
        first = next(site for site in sorted(shards) if len(shards[site]))
        unit = (wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).astype(np.float32)
        settings["targets"] = {first: unit}
    return simulation.select(shards, folder, strategy, **settings)


def rows_of(shards: Shards) -> int:
    return sum(len(values) for values in shards.values())


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "federated-kmeans")) for name in BUDGETED],
)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 40]), min_size=1, max_size=5).filter(any),
    st.sampled_from(["identical", "one topic", "topics", "all noise"]),
    st.one_of(st.integers(1, 200).map(str), st.sampled_from(["0.1%", "1.5%", "33%", "100%"])),
)
def test_the_budget_is_met_exactly_with_rows_that_exist_and_never_twice(
    strategy: str, sizes: list[int], kind: str, budget: str
) -> None:
    shards = world(sizes, kind)
    with tempfile.TemporaryDirectory() as folder:
        outcome = select(shards, Path(folder), strategy, selection_budget=budget, **FAST.get(strategy, {}))
    share = math.ceil(rows_of(shards) * float(budget[:-1]) / 100 - 1e-9) if budget.endswith("%") else int(budget)
    assert len(outcome.rows) == min(share, rows_of(shards))
    assert len(set(outcome.rows)) == len(outcome.rows)
    for site, row in outcome.rows:
        assert 0 <= row < len(shards[site])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["identical", "one topic", "topics", "all noise"])
@pytest.mark.parametrize("sizes", [[1], [0, 1], [2, 3], [30, 1, 0, 12]])
def test_without_a_budget_every_shard_gives_rows_that_exist(
    tmp_path: Path, strategy: str, kind: str, sizes: list[int]
) -> None:
    shards = world(sizes, kind)
    outcome = select(shards, tmp_path, strategy, **FAST.get(strategy, {}))
    assert len(set(outcome.rows)) == len(outcome.rows) <= rows_of(shards)
    for site, row in outcome.rows:
        assert 0 <= row < len(shards[site])
    if strategy == "full":
        assert len(outcome.rows) == rows_of(shards)
    # Whatever was grouped is on the map.
    grouped = {member for group in outcome.selection.groups for member in group.members}
    assert grouped <= outcome.selection.places.keys()
    assert all(len(at) == 2 and np.isfinite(at).all() for at in outcome.selection.places.values())


@pytest.mark.parametrize("strategy", REPORTING)
@pytest.mark.parametrize("budget", ["auto", "9"])
def test_the_order_in_which_sites_answer_does_not_matter(tmp_path: Path, strategy: str, budget: str) -> None:
    shards = world([40, 25, 3, 60], "topics")
    one = select(shards, tmp_path / "one", strategy, selection_budget=budget, **FAST.get(strategy, {}))
    other = select(
        shards,
        tmp_path / "other",
        strategy,
        selection_budget=budget,
        order=lambda names: names[::-1],
        **FAST.get(strategy, {}),
    )
    assert one.selection == other.selection
    assert one.picks == other.picks


@pytest.mark.parametrize("strategy", REPORTING)
def test_a_site_that_fails_is_as_if_it_had_not_been_there(tmp_path: Path, strategy: str) -> None:
    shards = world([40, 25, 30], "topics")
    without = {name: values for name, values in shards.items() if name != "site-1"}
    failed = select(
        shards, tmp_path / "failed", strategy, selection_budget="6", leaves={"site-1": 0}, **FAST.get(strategy, {})
    )
    absent = select(without, tmp_path / "absent", strategy, selection_budget="6", **FAST.get(strategy, {}))
    assert failed.picks == absent.picks


@pytest.mark.parametrize("strategy", REPORTING)
def test_under_noise_the_budget_is_an_upper_bound_and_no_site_shows_what_it_has(tmp_path: Path, strategy: str) -> None:
    shards = world([40, 25, 0, 3], "topics")
    noise: dict[str, Any] = {"selection_clip_norm": 1.0, "selection_noise_multiplier": 0.5, "released_centroids": 6}
    outcome = select(shards, tmp_path, strategy, selection_budget="20", **FAST.get(strategy, {}), **noise)
    assert 0 < len(outcome.rows) <= 20
    assert len(set(outcome.rows)) == len(outcome.rows)
    shapes = {site: [_shape(report) for name, report in outcome.reports if name == site] for site in shards}
    if issubclass(STRATEGY_SPECS[strategy], TargetSpec):
        # Which sites have target rows is no secret; how many they have is one.
        shapes = {site: own[1:] for site, own in shapes.items()}
    # Sites of 40, 25 and 3 rows send the same shapes; the one without rows takes no part.
    assert shapes["site-0"] == shapes["site-1"] == shapes["site-3"]
    for _, report in outcome.reports:
        if isinstance(report, selection_pb2.TargetReport) and not report.queries:
            # In the first step a site sends queries, if it has any.
            assert report.values_noise_std > 0 or not report.ListFields()
        else:
            assert report.noise_std > 0


def _shape(
    report: selection_pb2.ClusterReport | selection_pb2.KMeansStats | selection_pb2.TargetReport,
) -> tuple[object, ...]:
    """Everything about a report that is no noised value."""
    if isinstance(report, selection_pb2.TargetReport):
        queries = [(query.query_id, len(query.counts)) for query in report.queries]
        return report.dimension, report.noise_std, report.values_noise_std, len(report.values), queries
    if isinstance(report, selection_pb2.KMeansStats):
        clusters = [(each.cluster_id, len(each.sums), each.HasField("nearest")) for each in report.clusters]
        return report.dimension, report.noise_std, clusters
    centroids = [(centroid.cluster_id, len(centroid.values), centroid.size > 0) for centroid in report.centroids]
    return report.dimension, report.noise_std, report.unclustered, centroids


# Planted truth: which rows are about the same topic is known.

_TOPICS, _UNIQUE = 8, 2


def planted(seed: int) -> tuple[Shards, dict[str, npt.NDArray[np.int64]]]:
    """Ten sites with near-duplicates on eight topics, unevenly shared; two topics more are held by one site each."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(_TOPICS + _UNIQUE, 32))
    shards, truth = {}, {}
    for number in range(10):
        held = rng.choice(_TOPICS, size=rng.integers(2, 6), replace=False)
        # Every shared topic lies at two sites at least.
        held = np.unique([*held, number % _TOPICS, (number + 3) % _TOPICS])
        if number < _UNIQUE:
            held = np.append(held, _TOPICS + number)
        topics = np.repeat(held, rng.integers(4, 25, size=len(held)))
        values = centers[topics] + 0.02 * rng.normal(size=(len(topics), 32))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        shuffled = rng.permutation(len(topics))
        shards[f"site-{number}"] = values[shuffled].astype(np.float32)
        truth[f"site-{number}"] = topics[shuffled]
    return shards, truth


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize("strategy", [pytest.param("fedhds-aligned", marks=pytest.mark.slow), "federated-kmeans"])
def test_what_is_about_the_same_topic_is_put_together_and_no_topic_is_lost(
    tmp_path: Path, strategy: str, seed: int
) -> None:
    shards, truth = planted(seed)
    outcome = select(shards, tmp_path, strategy, selection_budget=str(_TOPICS + _UNIQUE))
    assert {int(truth[site][row]) for site, row in outcome.rows} == set(range(_TOPICS + _UNIQUE))
    topic_of = _topics_of_clusters(tmp_path, truth)
    together, right, same = 0, 0, 0
    group_of = {member: number for number, group in enumerate(outcome.selection.groups) for member in group.members}
    keys = sorted(topic_of)
    assert set(keys) == set(group_of)
    for place, one in enumerate(keys):
        for other in keys[:place]:
            alike, grouped = topic_of[one] == topic_of[other], group_of[one] == group_of[other]
            same += alike
            together += grouped
            right += alike and grouped
    assert right / same >= 0.95
    assert right / together >= 0.95


def _topics_of_clusters(folder: Path, truth: dict[str, npt.NDArray[np.int64]]) -> dict[tuple[str, int], int]:
    """The commonest topic of each cluster's rows, from what the sites keep at home."""
    found = {}
    for site, topics in truth.items():
        kept = [json.loads(path.read_text()) for path in (folder / site / "clusters").rglob("*.json")]
        (clusters,) = (entry["members"] for entry in kept)
        for number, members in enumerate(clusters):
            if members:
                found[site, number] = int(np.bincount(topics[members]).argmax())
    return found
