"""The interface of inter-client selection: reports in, a coreset per site out; pure, so that a crash can repeat it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedhds.runspec import RunSpec
from fedhds.v1 import federation_pb2 as pb


@dataclass(frozen=True, slots=True)
class SelectionContext:
    """What every strategy knows: declared rows per taking part site, and the rows allowed over all of them.

    `budget` is None only for strategies that set it themselves (RunSpec.budget_of).
    """

    seed: int
    round: int
    rows: Mapping[str, int]
    budget: int | None
    spec: RunSpec
    passes: int = 0
    """Passes over the sites that were done before the one that the reports are of."""
    centres: pb.Centres | None = None
    """The centres of that pass; None in the first."""
    cells: pb.CellReport = field(default_factory=pb.CellReport)
    """What the sites' sums of that pass add up to."""


@dataclass(frozen=True, slots=True)
class Report:
    """A site's clusters, or the counts of its cells, and the task by which it will know them again."""

    select_task_id: str
    clusters: pb.ClusterReport = field(default_factory=pb.ClusterReport)
    cells: pb.CellReport = field(default_factory=pb.CellReport)


@dataclass(frozen=True, slots=True)
class Group:
    """Clusters, as (site, cluster), that were found to be alike, and those of them that give rows."""

    members: tuple[tuple[str, int], ...]
    winners: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """A coreset for every site that trains; sites without one do not. `notes` and `places` are for people."""

    coresets: Mapping[str, pb.Coreset]
    groups: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()
    places: Mapping[tuple[str, int], Sequence[float]] = field(default_factory=dict)
    """Where in the plane the clusters (site, cluster) lie, those of no group too."""


class InterClientSelection(ABC):
    """Decides which rows of which sites train.

    Implementations MUST depend on nothing but their arguments, and not on the order of sites; MUST name only sites of
    the context that hold rows; and MUST NOT ask for more rows than a site declared.
    """

    needs_reports: bool

    @abstractmethod
    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection | pb.Centres:
        """The decision, or the centres of one more pass over the sites that answered.

        `reports` holds the sites that answered, and is empty unless `needs_reports`.
        """
