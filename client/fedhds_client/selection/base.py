"""The interface of intra-client selection: how a site groups its rows and what it releases about the groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedhds.errors import TaskError
from fedhds_client.selection.private_reporter import PrivateReporter

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from google.protobuf.message import Message

    from fedhds.spec import RunSpec
    from fedhds_client.features.extraction import Features


@dataclass(frozen=True)
class TargetRows:
    """The rows of a wanted task that a site has."""

    features: Callable[[], Features]
    gradients: Callable[[], Features]
    reporter: PrivateReporter
    """For what is released about them; they are no training rows."""


def _no_gradients(ids: npt.NDArray[np.int64] | None = None) -> Features:
    raise TaskError("this site takes no gradients of rows")


@dataclass(frozen=True)
class SelectionContext:
    """What a site gives a strategy for one select task."""

    task_id: str
    spec: RunSpec
    rows: int
    """Rows of the shard; ids run from 0 to rows - 1."""
    features: Callable[[], Features]
    """Takes the features of the whole shard under the task's adapter: the expensive part, so only when needed."""
    reporter: PrivateReporter
    request: Any = None
    """The coordinator's message of the strategy's `request_type`; None if it sent none."""
    draw_map: Callable[[Features, npt.NDArray[np.floating], npt.NDArray[np.int64]], None] = lambda *_: None
    """Keeps a map of the rows for the site's own people: features, the points (n, k) that were grouped, groups (n,)."""
    progress: Callable[[float], None] = lambda share: None
    """To be called after each long step with the share, 0 to 1, of what follows the features."""
    gradients: Callable[[npt.NDArray[np.int64] | None], Features] = _no_gradients
    """Takes sketches of the gradients of these rows, or of the whole shard: several times as expensive as features."""
    target: TargetRows | None = None
    """None: the site has none."""


class IntraClientSelection(ABC):
    """A strategy at the site: it reports on the rows, and the coordinator decides which of them train.

    Which rows train is resolved by `coreset_rows`, for all strategies.
    """

    @abstractmethod
    def release(self, context: SelectionContext) -> Message:
        """Groups the rows and releases what the task asks for, through `context.reporter` and by nothing else.

        MUST keep ids with what it computes of rows, and depend on nothing but its arguments.
        """

    def check_policy(self, reporter: PrivateReporter) -> None:
        """Raises PrivacyError when the site has not agreed to what the strategy releases."""

    def report(self, context: SelectionContext) -> Message:
        """What the site sends, durable when it is returned: a task that comes again gets the same bytes.

        Raises PrivacyError, before any work, when the site's policy or budget forbids the release; StorageError; and
        what `context.features` raises.
        """
        earlier = context.reporter.earlier(context.task_id)
        if earlier is not None:
            return earlier
        self.check_policy(context.reporter)
        context.reporter.check_budget()
        return self.release(context)
