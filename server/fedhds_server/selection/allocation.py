"""Allocates a budget to the rows of sites, as coresets."""

from __future__ import annotations

from collections.abc import Mapping

from fedhds.v2 import selection_pb2
from fedhds_server.selection.base import Report

Pool = tuple[str, int | None]
"""Rows of one site: of a cluster, or (None) of no cluster."""


def coresets(counts: Mapping[Pool, int], reports: Mapping[str, Report]) -> dict[str, selection_pb2.Coreset]:
    """The picks of every site that gives rows; `reports` names the tasks by which sites know their clusters."""
    coresets: dict[str, selection_pb2.Coreset] = {}
    for (site, cluster), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        picks = coresets.setdefault(site, selection_pb2.Coreset()).picks
        picks.select_task_id = reports[site].task_id
        if cluster is None:
            picks.unclustered = count
        else:
            picks.clusters.add(cluster_id=cluster, count=count)
    return coresets


def in_proportion(pools: Mapping[Pool, int], count: int) -> dict[Pool, int]:
    """`count` rows (or all) divided by what each pool holds: largest remainders, equal ones by name."""
    total = sum(pools.values())
    count = min(count, total)
    shares = {pool: divmod(count * size, total) for pool, size in pools.items() if size}
    short = count - sum(whole for whole, _ in shares.values())
    order = sorted(shares, key=lambda pool: (-shares[pool][1], pool[0], -1 if pool[1] is None else pool[1]))
    return {pool: rows for rank, pool in enumerate(order) if (rows := shares[pool][0] + (rank < short))}
