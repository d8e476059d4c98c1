"""What an intra-client selection strategy is: how a site groups its rows and what it lets out about the groups."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedhds_client.release import Releases

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fedhds.runspec import RunSpec
    from fedhds.v1 import federation_pb2 as pb
    from fedhds_client.features import Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectionContext:
    """What a site gives a strategy for one select task."""

    task_id: str
    spec: RunSpec
    rows: int
    """Rows of the shard; ids run from 0 to rows - 1."""
    features: Callable[[], Features]
    """Takes the features of the whole shard under the task's adapter: the expensive part, so only when needed."""
    releases: Releases
    centres: pb.Centres | None = None
    """What the coordinator gave for this pass, if the strategy has centres."""
    chart: Callable[[Features, npt.NDArray[np.floating], npt.NDArray[np.int64]], None] = lambda *_: None
    """Keeps a map of the rows for the site's own people: features, the points (n, k) that were grouped, groups (n,)."""


class IntraClientSelection(ABC):
    """A strategy at the site that reports clusters or cells, from which the coordinator decides who trains on what.

    Strategies whose coresets need nothing of the rows themselves (`full`, `random`) have no such class; which rows
    train is resolved for all of them by `coreset_rows`.
    """

    @abstractmethod
    def release(self, context: SelectionContext) -> pb.ClusterReport | pb.CellReport:
        """Groups the rows and releases what the task asks for, through `context.releases` and by nothing else.

        MUST keep ids with whatever it computes of rows, and depend on nothing but its arguments.
        """

    def report(self, context: SelectionContext) -> pb.ClusterReport | pb.CellReport:
        """What the site sends, durable when it is returned: a task that comes again gets the same bytes.

        Raises PrivacyError, before any work, when the site's budget forbids the release; StorageError; and what
        `context.features` raises.
        """
        earlier = context.releases.earlier(context.task_id)
        if earlier is not None:
            return earlier
        context.releases.check()
        return self.release(context)
