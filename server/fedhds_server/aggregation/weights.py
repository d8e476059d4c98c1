"""How much each update counts: its rows or tokens, bounded so that no party takes a round over by claiming many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run.parties import party_of


def weight_counts(results: Mapping[str, pb.TrainResult], weight_by: str) -> dict[str, int]:
    """What the sites' updates count by: rows, response tokens, or one each.

    Sites keep the tokens of a few rows to themselves: theirs are as many per row as those of all others together.
    """
    match weight_by:
        case "equal":
            return {site: min(result.samples, 1) for site, result in results.items()}
        case "tokens":
            said = [result for result in results.values() if result.HasField("response_tokens")]
            tokens, rows = sum(each.response_tokens for each in said), sum(each.samples for each in said)
            return {
                site: result.response_tokens
                if result.HasField("response_tokens")
                else result.samples * tokens // rows
                if rows
                else result.samples
                for site, result in results.items()
            }
    return {site: result.samples for site, result in results.items()}


def site_shares(samples: Mapping[str, int], largest: float) -> dict[str, float]:
    """Shares of the sites' updates over so many rows each: parties have `bounded_shares`, their sites by their rows."""
    totals: Counter[str] = Counter()
    for site, rows in samples.items():
        totals[party_of(site)] += rows
    shares = dict(zip(totals, bounded_shares(list(totals.values()), largest), strict=True))
    return {
        # In this order the only site of a party has exactly the party's share.
        site: float(shares[party_of(site)] * (rows / totals[party_of(site)])) if rows else 0.0
        for site, rows in samples.items()
    }


def bounded_shares(samples: Sequence[int], largest: float) -> npt.NDArray[np.float64]:
    """Shares float64 (n,) of parties over so many rows each: they sum to 1, none is above max(largest, 1 / n).

    What a bounded share loses goes to the others in proportion to their rows. All zeros stay zeros.
    """
    rows: npt.NDArray[np.float64] = np.asarray(samples, dtype=np.float64)
    if not rows.sum():
        return np.zeros(len(rows))
    shares: npt.NDArray[np.float64] = rows / rows.sum()
    with_rows = int((rows > 0).sum())
    bound = max(largest, 1 / with_rows)
    bounded = np.zeros(len(rows), dtype=bool)
    # Each pass bounds one more at least, as what the others gain may lift one of them over the bound.
    while (over := (shares > bound * (1 + 1e-12)) & ~bounded).any():
        bounded |= over
        shares[bounded] = bound
        free = ~bounded & (rows > 0)
        if free.any():
            shares[free] = rows[free] / rows[free].sum() * (1 - bound * bounded.sum())
    return shares
