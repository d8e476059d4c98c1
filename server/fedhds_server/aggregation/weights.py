"""How much each update counts: its rows, bounded so that no site can take a round over by claiming many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def bounded_shares(samples: Sequence[int], largest: float) -> npt.NDArray[np.float64]:
    """Shares float64 (n,) of updates over so many rows each: they sum to 1, none is above max(largest, 1 / n).

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
