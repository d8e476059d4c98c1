"""Global selection: Lloyd's k-means over all sites' rows from sums and counts alone, then rows from every cell.

Sums and counts per cell are all that Lloyd's algorithm needs of the rows, so without noise this is k-means on the
pooled rows, found without moving them. Centres start from the mean of all rows and split (Linde, Buzo & Gray 1980, "An
Algorithm for Vector Quantizer Design", III), those with the most distortion first: as all rows have one known norm, it
follows from sums and counts as well. More than are wanted are then merged by Ward's linkage.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from fedhds.lloyd import OVERSPLIT, UNIT, splitting_passes
from fedhds.v1 import federation_pb2 as pb
from fedhds_server.selection.apportion import Pool, coresets, in_proportion
from fedhds_server.selection.base import Group, InterClientSelection, Report, Selection, SelectionContext
from fedhds_server.selection.plane import plane

FloatArray = npt.NDArray[np.float64]

# Halves of a split cell part along a hyperplane through its mean, whatever this length is; features have norm 1.
_NUDGE = 1e-3


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells with rows, by number of their centre: counts (m,), means (m, d) and distortions (m,)."""

    numbers: npt.NDArray[np.int64]
    counts: FloatArray
    means: FloatArray
    distortions: FloatArray
    """Sums of the rows' squared distances from the mean."""

    @classmethod
    def of(cls, report: pb.CellReport, *, norm: float) -> Cells:
        """The cells that hold rows, all of which have norm `norm`; under noise those whose count stands out of it."""
        cells = [cell for cell in report.cells if cell.count > max(0.0, report.noise_std)]
        counts = np.array([cell.count for cell in cells], dtype=np.float64)
        sums = np.array([list(cell.sums) for cell in cells], dtype=np.float64).reshape(len(cells), report.dimension)
        means = sums / UNIT / counts[:, None]
        distortions = counts * np.maximum(0.0, norm**2 - (means**2).sum(axis=1))
        return cls(np.array([cell.centre for cell in cells], dtype=np.int64), counts, means, distortions)


class Global(InterClientSelection):
    """As many centres as rows are wanted, over all sites' rows; the row nearest to each trains.

    Without noise the winner of a cell is the nearest of all rows (equally near ones: the first site by name, then the
    first row). Cells that stay empty, and a budget beyond the cells, are made up for by the next nearest rows, in
    proportion to what the cells hold at each site. Under noise there are `released_centroids` centres, no distances,
    and the budget is divided by noised counts; each site then picks rows of its cells that lie far apart.
    """

    needs_reports = True

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection | pb.Centres:
        spec, centres = context.spec, context.centres
        if centres is None:
            wanted = spec.released_centroids if spec.noised else context.budget or 1
        else:
            wanted = centres.wanted
        if centres is not None and centres.last:
            return _picks(context, reports)
        cells = Cells.of(context.cells, norm=min(1.0, spec.clip_norm or 1.0))
        if not len(cells.counts):
            return Selection({}, notes=("no site has rows to take centres from",))
        splitting = splitting_passes(wanted)
        done = context.passes + 1
        if done < splitting:
            found = split(cells, min(2**done, OVERSPLIT * wanted), seed=spec.seed)
        elif done == splitting:
            found = merge(cells, wanted)
        else:
            found = split(cells, wanted, seed=spec.seed)
        return pb.Centres(
            dimension=spec.feature_dimension,
            values=found.astype(np.float32).ravel(),
            last=done == splitting + spec.lloyd_passes,
            wanted=wanted,
        )


def split(cells: Cells, wanted: int, *, seed: int) -> FloatArray:
    """The means, those with the most distortion in two until there are `wanted` (each at most once)."""
    coarsest = np.lexsort((cells.numbers, -cells.distortions))[: max(0, wanted - len(cells.counts))]
    pairs = [_nudge(cells, index, seed) for index in sorted(coarsest.tolist())]
    kept = np.delete(cells.means, coarsest, axis=0)
    return np.concatenate([kept, *pairs]) if pairs else kept


def _nudge(cells: Cells, index: int, seed: int) -> FloatArray:
    name = f"fedhds split/{seed}/{len(cells.counts)}/{cells.numbers[index]}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    direction = np.random.default_rng(key).standard_normal(cells.means.shape[1])
    step = _NUDGE * direction / np.linalg.norm(direction)
    return np.stack([cells.means[index] - step, cells.means[index] + step])


def merge(cells: Cells, wanted: int) -> FloatArray:
    """`wanted` centres out of more: the two whose union adds least to the rows' squared distances, again and again.

    That is Ward's linkage with every mean weighted by its rows.
    """
    means, counts = cells.means.copy(), cells.counts.copy()
    costs = cdist(means, means, "sqeuclidean") * (counts[:, None] * counts) / (counts[:, None] + counts)
    np.fill_diagonal(costs, np.inf)
    alive = np.ones(len(counts), dtype=bool)
    for _ in range(len(counts) - wanted):
        first, second = sorted(divmod(int(costs.argmin()), len(counts)))
        together = counts[first] + counts[second]
        means[first] = (counts[first] * means[first] + counts[second] * means[second]) / together
        counts[first] = together
        alive[second] = False
        others = alive.copy()
        others[first] = False
        squares = ((means[others] - means[first]) ** 2).sum(axis=1)
        costs[first, others] = costs[others, first] = squares * together * counts[others] / (together + counts[others])
        costs[second, :] = costs[:, second] = np.inf
    return means[alive]


def _picks(context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
    """The rows, once the centres stand."""
    budget = context.budget or 0
    at: dict[int, dict[str, pb.Cell]] = {}
    for site in sorted(reports):
        for cell in reports[site].cells.cells:
            if cell.count > 0:
                at.setdefault(cell.centre, {})[site] = cell
    heaviest = sorted(at, key=lambda centre: (-sum(cell.count for cell in at[centre].values()), centre))
    counts: Counter[Pool] = Counter()
    winners: dict[int, tuple[tuple[str, int], ...]] = {}
    if context.spec.noised:
        # Every cell gives alike, as far as its counts reach; within it sites give by what they hold.
        for rank, centre in enumerate(heaviest):
            share = budget // len(heaviest) + (rank < budget % len(heaviest))
            held: dict[Pool, int] = {(site, centre): cell.count for site, cell in at[centre].items()}
            counts.update(in_proportion(held, share))
            winners[centre] = tuple((site, centre) for site in at[centre] if counts[site, centre])
    else:
        for centre in heaviest[:budget]:
            winner = min(at[centre], key=lambda site: (at[centre][site].nearest, site))
            counts[winner, centre] = 1
            winners[centre] = ((winner, centre),)
        left: dict[Pool, int] = {
            (site, centre): cell.count - counts[site, centre] for centre in at for site, cell in at[centre].items()
        }
        counts.update(in_proportion(left, budget - counts.total()))
    groups = tuple(
        Group(tuple((site, centre) for site in sorted(at[centre])), winners.get(centre, ())) for centre in sorted(at)
    )
    shared = sum(len(group.members) > 1 for group in groups)
    note = (
        f"{len(groups)} cells over {len(reports)} sites, {shared} of them with rows of several sites; "
        f"{counts.total()} rows are picked"
    )
    centres = context.centres or pb.Centres(dimension=1)
    at_centre = plane(np.array(centres.values).reshape(-1, centres.dimension)).tolist()
    places = {member: at_centre[member[1]] for group in groups for member in group.members}
    return Selection(coresets(counts, reports), groups, (note,), places)
