"""The baseline of every strategy: a uniform draw of the budget from the pooled rows of all sites."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedhds.v2 import selection_pb2 as pb
from fedhds_server.run.parties import party_of
from fedhds_server.selection.base import InterClientSelection, Report, Selection, SelectionContext


class Random(InterClientSelection):
    """How many rows each site gives is drawn as if the pool lay in one place (multivariate hypergeometric).

    But no party gives more than its largest share of a round's weight: what that exceeds is drawn from the others.
    """

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        groups: dict[str, list[str]] = {}
        for site in sorted(context.rows):
            groups.setdefault(party_of(site), []).append(site)
        rng = np.random.default_rng([context.spec.seed, context.round_number])
        shards = [np.array([context.rows[site] for site in sites], dtype=np.int64) for sites in groups.values()]
        rows = np.array([shard.sum() for shard in shards], dtype=np.int64)
        budget, largest = min(context.budget or 0, int(rows.sum())), context.spec.aggregation.max_weight_share
        drawn = _draw(rng, rows, budget, largest=largest)
        counts: dict[str, int] = {}
        for sites, shard, count in zip(groups.values(), shards, drawn.tolist(), strict=True):
            # Of one site nothing is left to chance, and nothing is drawn.
            own = rng.multivariate_hypergeometric(shard, count, method="marginals") if len(sites) > 1 else [count]
            counts |= {site: int(taken) for site, taken in zip(sites, own, strict=True) if taken}
        return Selection(
            {
                site: pb.Coreset(random=pb.RandomRows(count=count, seed=_site_seed(context, site)))
                for site, count in counts.items()
            }
        )


def _draw(
    rng: np.random.Generator, rows: npt.NDArray[np.int64], budget: int, *, largest: float
) -> npt.NDArray[np.int64]:
    """How many of its `rows` (n,) each party gives: none more than the share `largest` while others have rows left.

    Beyond that share an update has no weight (aggregation.weights), and what a site declares cannot be checked.
    """
    limit = math.ceil(budget * max(largest, 1 / max(1, int((rows > 0).sum()))))
    counts = np.zeros_like(rows)
    free = rows > 0
    while missing := budget - int(counts.sum()):
        room = np.where(free, rows - counts, 0)
        if not room.any():
            # The others have given all their rows.
            return counts + rng.multivariate_hypergeometric(rows - counts, missing, method="marginals")
        counts += rng.multivariate_hypergeometric(room, min(missing, int(room.sum())), method="marginals")
        free &= counts < limit
        counts = np.minimum(counts, limit)
    return counts


def _site_seed(context: SelectionContext, site: str) -> int:
    text = f"{context.spec.seed}/{context.round_number}/{site}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
