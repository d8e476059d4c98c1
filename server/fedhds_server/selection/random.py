"""The bar for every strategy: a uniform draw of the budget from the pooled rows of all sites."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from fedhds.v1 import federation_pb2 as pb
from fedhds_server.selection.base import InterClientSelection, Report, Selection, SelectionContext


class Random(InterClientSelection):
    """How many rows each site gives is drawn as if the pool lay in one place (multivariate hypergeometric)."""

    needs_reports = False

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        sites = sorted(context.rows)
        pool = sum(context.rows.values())
        rng = np.random.default_rng([context.seed, context.round])
        counts = rng.multivariate_hypergeometric(
            [context.rows[site] for site in sites], min(context.budget or 0, pool), method="marginals"
        )
        return Selection(
            {
                site: pb.Coreset(random=pb.RandomRows(count=int(count), seed=_site_seed(context, site)))
                for site, count in zip(sites, counts, strict=True)
                if count
            }
        )


def _site_seed(context: SelectionContext, site: str) -> int:
    text = f"{context.seed}/{context.round}/{site}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
