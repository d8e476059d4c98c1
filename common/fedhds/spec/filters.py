"""Filters of rows: a score for each row at its site, in bins that everybody knows, and one threshold for all sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator

from fedhds.spec.amounts import is_share

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BINS = 256
"""Bins of every filter's scores; those outside of all are in the first or the last one."""


@dataclass(frozen=True)
class FilterSpec:
    """A filter: what its score says, and which of the rows stay."""

    summary: str
    keeps: Literal["high", "middle"]
    """Rows with the highest scores, or those that are neither among the lowest nor among the highest."""
    low: float
    """Lower edge of the first bin."""
    width: float
    """Of every bin; the score may be a logarithm, for even relative steps."""
    of_one_row: bool = True
    """Whether a row's score depends on that row alone; else noise on counts hides no row."""

    def bins(self, scores: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The bin of each finite score."""
        import numpy as np

        places = np.floor((np.asarray(scores, dtype=np.float64) - self.low) / self.width)
        return np.clip(places, 0, BINS - 1).astype(np.int64)


FILTER_SPECS: dict[str, FilterSpec] = {
    # The loss of an answer without its prompt, less that with it (FedDQC, arXiv 2410.11540; IFD, arXiv 2308.12032).
    "alignment": FilterSpec("how much the prompt tells of the answer, in nats per token", "high", -2.0, 1 / 32),
    "length": FilterSpec("the length of the answer, as log2 of its tokens", "middle", 0.0, 1 / 16),
    # Of float32 features of norm 1, distances below 2^-12 are rounding.
    "duplicates": FilterSpec(
        "the distance to the nearest row before it at its site, as log2 of that of features of norm 1",
        "high",
        -12.0,
        1 / 16,
        of_one_row=False,
    ),
}


def _check_filters(filters: str) -> str:
    names = filters.split(",") if filters else []
    unknown = next((name for name in names if name not in FILTER_SPECS), None)
    if unknown is not None or len(set(names)) < len(names):
        raise ValueError(f"give names out of {', '.join(FILTER_SPECS)}, each once, divided by commas")
    return filters


def _check_share(share: str) -> str:
    if not is_share(share):
        raise ValueError("give a share above 0% and up to 100%")
    return share


Filters = Annotated[str, AfterValidator(_check_filters)]
Share = Annotated[str, AfterValidator(_check_share)]
