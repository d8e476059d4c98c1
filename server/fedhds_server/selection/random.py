"""The baseline of every strategy: a uniform draw of the budget from the pooled rows of all sites."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedhds.v2 import selection_pb2 as pb
from fedhds_server.selection.base import InterClientSelection, Report, Selection, SelectionContext


class Random(InterClientSelection):
    """How many rows each site gives is drawn as if the pool lay in one place (multivariate hypergeometric).

    But no site gives more than its largest share of a round's weight: what that exceeds is drawn from the others.
    """

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        sites = sorted(context.rows)
        pool = sum(context.rows.values())
        rng = np.random.default_rng([context.spec.seed, context.round_number])
        rows = np.array([context.rows[site] for site in sites], dtype=np.int64)
        counts = _draw(rng, rows, min(context.budget or 0, pool), largest=context.spec.aggregation.max_weight_share)
        return Selection(
            {
                site: pb.Coreset(random=pb.RandomRows(count=int(count), seed=_site_seed(context, site)))
                for site, count in zip(sites, counts, strict=True)
                if count
            }
        )


def _draw(
    rng: np.random.Generator, rows: npt.NDArray[np.int64], budget: int, *, largest: float
) -> npt.NDArray[np.int64]:
    """How many of its `rows` (n,) each site gives: none more than the share `largest` while others have rows left.

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
