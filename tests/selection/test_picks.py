"""Groups that are fewer than the rows wanted: their shares of the budget, and which of their rows they give."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation import Outcome, Shards, select
from fedhds.spec import STRATEGY_SPECS, GroupingSpec, RunSpec, Shares
from fedhds_client.selection.coreset import in_drawn_order
from fedhds_server.selection.allocation import group_shares

GROUPING = [name for name, spec in STRATEGY_SPECS.items() if issubclass(spec, GroupingSpec)]
REDUCTION: dict[str, dict[str, Any]] = {"fedhds": {"reduction": "pca"}, "fedhds-aligned": {"reduction": "none"}}
# Rows of each topic over all sites.
TOPICS = (16, 36, 64, 100)


def world() -> tuple[Shards, dict[str, npt.NDArray[np.int64]]]:
    """Four sites with rows of four topics, far apart."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(len(TOPICS), 12))
    topics = rng.permutation(np.repeat(np.arange(len(TOPICS)), TOPICS))
    shards, truth = {}, {}
    for number, part in enumerate(np.array_split(topics, 4)):
        values = centers[part] + 0.05 * rng.normal(size=(len(part), 12))
        shards[f"site-{number}"] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
        truth[f"site-{number}"] = part
    return shards, truth


def run(folder: Path, strategy: str, **settings: Any) -> Outcome:
    return select(world()[0], folder, strategy, **{"max_weight_share": 1.0, **REDUCTION.get(strategy, {}), **settings})


def topics_of(outcome: Outcome) -> Counter[int]:
    truth = world()[1]
    return Counter(int(truth[site][row]) for site, row in outcome.rows)


@given(
    st.lists(st.integers(0, 60), max_size=12),
    st.integers(0, 200),
    st.sampled_from(["equal", "proportional", "sqrt"]),
)
def test_shares_meet_the_budget_and_no_group_gives_more_than_it_has(
    sizes: list[int], budget: int, shares: Shares
) -> None:
    amounts = group_shares(sizes, budget, shares)
    assert sum(amounts) == min(budget, sum(sizes))
    assert all(0 <= amount <= size for amount, size in zip(amounts, sizes, strict=True))
    if shares == "equal":
        unexhausted = [amount for amount, size in zip(amounts, sizes, strict=True) if amount < size]
        assert not unexhausted or max(amounts) - min(unexhausted) <= 1
    # More rows never mean a smaller share.
    order = np.argsort(sizes, kind="stable")[::-1]
    assert all(amounts[one] >= amounts[other] - 1 for one, other in itertools.pairwise(order))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [("equal", (10, 10, 10, 10)), ("proportional", (3, 7, 12, 19)), ("sqrt", (6, 9, 11, 14))],
)
@pytest.mark.parametrize("strategy", ["fedhds-aligned", "federated-kmeans"])
@pytest.mark.parametrize("pick", ["nearest", "drawn"])
def test_topics_get_their_shares(
    tmp_path: Path, strategy: str, pick: str, shares: str, expected: tuple[int, ...]
) -> None:
    outcome = run(
        tmp_path, strategy, selection_budget="40", selection_groups=4, selection_shares=shares, selection_pick=pick
    )
    counts = topics_of(outcome)
    assert sum(counts.values()) == 40
    # Rows outside of all clusters of a site count for no group.
    for topic, count in enumerate(expected):
        assert abs(counts[topic] - count) <= 2


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "federated-kmeans")) for name in GROUPING],
)
@pytest.mark.parametrize("settings", [{"selection_groups": 3}, {"selection_pick": "drawn"}])
def test_budgets_are_met_in_any_order_of_sites(tmp_path: Path, strategy: str, settings: dict[str, Any]) -> None:
    for budget in ("1", "7", "25"):
        one = run(tmp_path / budget, strategy, selection_budget=budget, **settings)
        assert len(set(one.rows)) == len(one.rows) == int(budget)
        other = run(
            tmp_path / f"{budget} again",
            strategy,
            selection_budget=budget,
            order=lambda names: names[::-1],
            **settings,
        )
        assert one.picks == other.picks


def test_the_nearest_rows_are_nearer_than_drawn_ones(tmp_path: Path) -> None:
    shards, truth = world()
    values, topics = np.concatenate([*shards.values()]), np.concatenate([*truth.values()])
    means = np.stack([values[topics == topic].mean(axis=0) for topic in range(len(TOPICS))])

    def spread(pick: str) -> float:
        settings: dict[str, Any] = {"selection_groups": 4, "selection_pick": pick, "selection_budget": "40"}
        rows = run(tmp_path / pick, "federated-kmeans", **settings).rows
        return float(np.mean([np.linalg.norm(shards[site][row] - means[truth[site][row]]) for site, row in rows]))

    assert spread("nearest") < 0.9 * spread("drawn")


def test_chance_draws_every_row_alike() -> None:
    firsts = Counter(
        in_drawn_order([[3, 5, 8], [1]], rows=9, seed=seed, task_id="select/0/ward")[0][0] for seed in range(600)
    )
    assert set(firsts) == {3, 5, 8}
    assert all(150 < count < 250 for count in firsts.values())
    # A row that is left out moves no others.
    whole = in_drawn_order([[*range(9)]], rows=9, seed=1, task_id="t")[0]
    assert in_drawn_order([[0, 1, 2, 4, 5, 6, 7, 8]], rows=9, seed=1, task_id="t")[0] == [r for r in whole if r != 3]


def test_under_noise_shares_go_by_noised_counts(tmp_path: Path) -> None:
    noise: dict[str, Any] = {"selection_clip_norm": 1.0, "selection_noise_multiplier": 0.2, "released_centroids": 4}
    outcome = run(tmp_path, "federated-kmeans", selection_budget="40", selection_shares="proportional", **noise)
    counts = topics_of(outcome)
    assert counts[3] > counts[0] + 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection_shares": "sqrt"}, "set --selection-groups below the budget"),
        ({"selection_groups": 3, "selection_strategy": "fedhds"}, "set --selection-budget"),
        (
            {"selection_groups": 3, "selection_clip_norm": 1.0, "selection_noise_multiplier": 1.0},
            "with noise --released-centroids is their number",
        ),
        (
            {
                "selection_strategy": "fedhds-aligned",
                "selection_shares": "sqrt",
                "selection_clip_norm": 1.0,
                "selection_noise_multiplier": 1.0,
            },
            "no sizes of groups are known",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSpec.of(**{"model": "m", "rounds": 1, "selection_strategy": "federated-kmeans", **settings})
