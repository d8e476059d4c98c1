"""Partitions: every row at exactly one site, the same for a seed, and as alike as was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhds.errors import UsageError
from fedhds_client.data.partition import By, partition

WAYS: tuple[By, ...] = get_args(By)
NAMES = ("brainstorming", "chat", "qa")
POOL = [NAMES[number % 3] for number in range(600)]


def parts(categories: Sequence[str] = POOL, **options: Any) -> list[list[int]]:
    defaults: dict[str, Any] = {"sites": 10, "by": "dirichlet", "alpha": 0.5, "min_rows": 1, "seed": 42}
    return partition(categories, **(defaults | options))


def counts(split: list[list[int]], categories: Sequence[str] = POOL) -> list[Counter[str]]:
    return [Counter(categories[row] for row in part) for part in split]


def spread(split: list[list[int]]) -> float:
    """Mean distance of the sites' shares of categories from the pool's, 0 (alike) to 1."""
    return float(np.mean([sum(abs(of[name] / of.total() - 1 / 3) for name in NAMES) / 2 for of in counts(split)]))


@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=80),
    st.sampled_from(WAYS),
    st.integers(1, 4),
    st.sampled_from([0.3, 1.0, 1e6]),
    st.integers(0, 2**63),
)
def test_every_row_is_at_exactly_one_site(categories: list[str], by: By, sites: int, alpha: float, seed: int) -> None:
    sites = min(sites, len(categories))
    options: dict[str, Any] = {"sites": sites, "by": by, "alpha": alpha, "min_rows": 0, "seed": seed}
    split = parts(categories, **options)
    assert sorted(row for part in split for row in part) == list(range(len(categories)))
    assert len(split) == (len(set(categories)) if by == "task" else sites)
    assert parts(categories, **options) == split


@pytest.mark.parametrize("by", WAYS)
def test_another_seed_deals_the_rows_out_otherwise(by: By) -> None:
    drawn = [parts(by=by, seed=seed) for seed in (1, 2)]
    assert drawn[0] != drawn[1]


def test_the_callers_random_state_has_no_say() -> None:
    np.random.seed(0)
    one = parts()
    np.random.seed(1)
    assert parts() == one


@pytest.mark.parametrize("by", ["iid", "category"])
@pytest.mark.parametrize(("rows", "sites"), [(600, 10), (600, 7), (10, 10), (11, 10), (5, 1)])
def test_equal_runs_differ_by_one_row_at_most(by: By, rows: int, sites: int) -> None:
    sizes = [len(part) for part in parts(POOL[:rows], by=by, sites=sites)]
    assert len(sizes) == sites
    assert max(sizes) - min(sizes) <= 1


def test_iid_sites_hold_the_categories_in_the_pools_shares() -> None:
    assert spread(parts(by="iid", sites=5)) < 0.06


def test_by_category_a_site_holds_one_run_of_the_categories() -> None:
    held = counts(parts(by="category", sites=6))
    assert [set(of) for of in held] == [{name} for name in NAMES for _ in range(2)]
    straddling = counts(parts(by="category", sites=2))
    assert straddling == [
        {"brainstorming": 200, "chat": 100},
        {"chat": 100, "qa": 200},
    ]


def test_by_category_the_rows_of_a_category_are_dealt_out_at_random() -> None:
    first, second = parts(by="category", sites=6)[:2]
    assert min(second) < max(first)


def test_by_task_every_category_is_a_site_whatever_number_was_asked_for() -> None:
    for sites in (1, 3, 999):
        split = parts(by="task", sites=sites, min_rows=500)
        assert counts(split) == [{name: 200} for name in NAMES]


def test_a_smaller_alpha_makes_sites_less_alike() -> None:
    spreads = [
        float(np.mean([spread(parts(alpha=alpha, sites=5, seed=seed)) for seed in range(20)]))
        for alpha in (0.1, 1.0, 10.0, 1e4)
    ]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 0.4
    assert spreads[-1] < 0.01


def test_the_shares_of_a_category_are_distributed_as_dirichlet_says() -> None:
    alpha, sites, rows = 0.5, 3, ["qa"] * 1000
    shares = np.array(
        [
            [len(part) / 1000 for part in parts(rows, alpha=alpha, sites=sites, min_rows=0, seed=seed)]
            for seed in range(2000)
        ]
    )
    mean = 1 / sites
    # Every share is Beta(alpha, (sites - 1) alpha).
    deviation = (mean * (1 - mean) / (sites * alpha + 1)) ** 0.5
    assert shares.mean(axis=0) == pytest.approx([mean] * sites, abs=0.03)
    assert shares.std(axis=0) == pytest.approx([deviation] * sites, abs=0.02)


@pytest.mark.parametrize("alpha", [1e-300, 0.01, 0.5, 1e300])
def test_every_site_has_the_fewest_rows_that_were_asked_for(alpha: float) -> None:
    split = parts(alpha=alpha, sites=3, min_rows=20)
    assert min(map(len, split)) >= 20
    assert sum(map(len, split)) == 600


def test_a_pool_that_is_too_small_is_an_error_that_names_the_flag() -> None:
    by: By
    for by in ("dirichlet", "category", "iid"):
        assert sum(map(len, parts(by=by, sites=10, min_rows=60, alpha=1e9))) == 600
        with pytest.raises(UsageError, match=r"^--sites: 10 sites of at least 61 rows need 610 rows, there are 600"):
            parts(by=by, sites=10, min_rows=61)
        with pytest.raises(UsageError, match=r"^--sites"):
            parts(by=by, sites=601)
        with pytest.raises(UsageError, match=r"^--sites"):
            parts([], by=by, sites=1)
        with pytest.raises(UsageError, match=r"^--sites"):
            parts(POOL[:3], by=by, sites=4, min_rows=0)


def test_an_alpha_that_leaves_a_site_short_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(UsageError, match=r"^--alpha: no draw of Dirichlet\(0\.01\) gave every one of 10 sites 50 rows"):
        parts(alpha=0.01, sites=10, min_rows=50)
