"""Allocates a budget to the rows of sites, as coresets; no party gets more than its bound."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedhds.spec import Shares
from fedhds.v2 import selection_pb2
from fedhds_server.run.parties import parties, party_of
from fedhds_server.selection.base import Report, SelectionContext

Rng = np.random.Generator

Pool = tuple[str, int | None]
"""Rows of one site: of a cluster, or (None) of no cluster."""


class Allocation:
    """Rows that are given out of a budget, pool by pool.

    The sites of one party together get no more than `--max-weight-share` of the budget while others have rows left, and
    at least its part if all parties had the same: what a site says of its rows cannot be checked.
    """

    def __init__(self, context: SelectionContext, budget: int) -> None:
        trainers = [site for site, rows in context.rows.items() if rows]
        share = max(context.spec.aggregation.max_weight_share, 1 / max(1, len(parties(trainers))))
        # A hair below, so that a third of 6 is 2 despite binary floats.
        self._limit = math.ceil(budget * share - 1e-9)
        self._by_party: Counter[str] = Counter()
        self._rank = context.rank
        self.counts: Counter[Pool] = Counter()
        """Rows given so far."""

    def first(self, clusters: Iterable[tuple[str, int]]) -> tuple[str, int] | None:
        """Takes one row of the first of `clusters` whose party is below its bound; None when there is none."""
        cluster = next((cluster for cluster in clusters if self._room(cluster[0])), None)
        if cluster is not None:
            self._give(cluster, 1)
        return cluster

    def give(self, groups: Sequence[Mapping[Pool, int]], budget: int, *, shares: Shares, rng: Rng | None) -> None:
        """Gives a budget to groups of pools of rows; what a group cannot give comes from all rows that are left.

        With `rng` rows are drawn, so that chance decides which pool gives; else pools give in proportion.
        """
        amounts = group_shares([sum(group.values()) for group in groups], budget, shares)
        for group, amount in zip(groups, amounts, strict=True):
            self.divide(group, amount, exactly=False, rng=rng)
        left = {pool: rows - self.counts[pool] for group in groups for pool, rows in group.items()}
        self.divide(left, budget - self.counts.total(), exactly=True, rng=rng)

    def divide(self, pools: Mapping[Pool, int], count: int, *, exactly: bool, rng: Rng | None = None) -> None:
        """Gives `count` rows to `pools` in proportion to the rows that they have left, or (with `rng`) as drawn.

        What a bounded party would get goes to the others; with `exactly`, what these cannot give comes from it after
        all.
        """
        left = {pool: rows for pool, rows in pools.items() if rows > 0}
        while count > 0 and (free := {pool: rows for pool, rows in left.items() if rows and self._room(pool[0])}):
            for pool, rows in self._divided(free, count, rng).items():
                taken = min(rows, self._room(pool[0]))
                self._give(pool, taken)
                left[pool] -= taken
                count -= taken
        if exactly and count > 0:
            for pool, rows in self._divided(left, count, rng).items():
                self._give(pool, rows)

    def _divided(self, pools: Mapping[Pool, int], count: int, rng: Rng | None) -> dict[Pool, int]:
        if rng is None:
            return in_proportion(pools, count, rank=self._rank)
        order = sorted(pools, key=lambda pool: (self._rank(pool[0]), -1 if pool[1] is None else pool[1]))
        rows = np.array([pools[pool] for pool in order], dtype=np.int64)
        counts = rng.multivariate_hypergeometric(rows, min(count, int(rows.sum())), method="marginals")
        return {pool: int(taken) for pool, taken in zip(order, counts, strict=True) if taken}

    def _room(self, site: str) -> int:
        return self._limit - self._by_party[party_of(site)]

    def _give(self, pool: Pool, rows: int) -> None:
        self.counts[pool] += rows
        self._by_party[party_of(pool[0])] += rows


def group_shares(sizes: Sequence[int], budget: int, shares: Shares) -> list[int]:
    """Rows of the budget that each group of this many rows gives, none more than it has; of equal ones the first more.

    What small groups cannot give goes to the others, by the same rule.
    """
    power = {"equal": 0.0, "sqrt": 0.5, "proportional": 1.0}[shares]
    amounts = [0] * len(sizes)
    left = min(budget, sum(size for size in sizes if size > 0))
    while left:
        free = [place for place, size in enumerate(sizes) if size > amounts[place]]
        weights = {place: float(sizes[place]) ** power for place in free}
        total, given = sum(weights.values()), 0
        exact = {place: left * weights[place] / total for place in free}
        for place in free:
            taken = min(int(exact[place]), sizes[place] - amounts[place])
            amounts[place] += taken
            given += taken
        if not given:
            # Fewer rows than groups: those whose part is largest give one more.
            for place in sorted(free, key=lambda place: (-exact[place], place))[:left]:
                amounts[place] += 1
                given += 1
        left -= given
    return amounts


def coresets(counts: Mapping[Pool, int], reports: Mapping[str, Report]) -> dict[str, selection_pb2.Coreset]:
    """The picks of every site that gives rows; `reports` names the tasks by which sites know their clusters."""
    coresets: dict[str, selection_pb2.Coreset] = {}
    for (site, cluster), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        if not count:
            continue
        picks = coresets.setdefault(site, selection_pb2.Coreset()).picks
        picks.select_task_id = reports[site].task_id
        if cluster is None:
            picks.unclustered = count
        else:
            picks.clusters.add(cluster_id=cluster, count=count)
    return coresets


def in_proportion(pools: Mapping[Pool, int], count: int, *, rank: Callable[[str], Any] = str) -> dict[Pool, int]:
    """`count` rows (or all) divided by what each pool holds: largest remainders, equal ones by the `rank` of sites."""
    total = sum(pools.values())
    count = min(count, total)
    shares = {pool: divmod(count * size, total) for pool, size in pools.items() if size}
    short = count - sum(whole for whole, _ in shares.values())
    order = sorted(shares, key=lambda pool: (-shares[pool][1], rank(pool[0]), -1 if pool[1] is None else pool[1]))
    return {pool: rows for place, pool in enumerate(order) if (rows := shares[pool][0] + (place < short))}
