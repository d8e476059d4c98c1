"""What a coordinator's process counts as it happens, because the run's state does not hold it."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from fedhds import errors
from fedhds.errors import FedhdsError
from fedhds.runtime.metrics import Counted

# From an SSD's milliseconds to the 10 s after which a locked database is given up.
SAVE_SECONDS = Histogram(
    "fedhds_store_save_seconds",
    "Time to make the run's state durable; every answer to a site waits for it.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
SAVE_FAILURES = Counter("fedhds_store_save_failures", "Saves of the run's state that failed; who asked was told so.")
_WORK_BUCKETS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)
SELECTION_SECONDS = Histogram(
    "fedhds_selection_seconds",
    "Time that the strategy took for one step of a selection, sites' work not included.",
    buckets=_WORK_BUCKETS,
)
AGGREGATION_SECONDS = Histogram(
    "fedhds_aggregation_seconds", "Time to combine a round's updates into the new adapter.", buckets=_WORK_BUCKETS
)
DOWNLOADED_BYTES = Counter("fedhds_downloaded_bytes", "Bytes of adapters that this process has sent to sites.")
REJECTED = Counter(
    "fedhds_results_rejected",
    "Results that did not pass validation, by what was wrong: the training loss, the count of samples, the adapter "
    "(names, shapes, types, finiteness, norm), the report of a selection.",
    ("reason",),
)
for _reason in ("loss", "samples", "adapter", "report"):
    REJECTED.labels(_reason)
FAILED = Counter(
    "fedhds_tasks_failed",
    "Tasks that failed at their site, by the error: a class of fedhds, or other (a library's, in the site's log).",
    ("task", "error"),
)
COUNTED: tuple[Counted, ...] = (
    SAVE_SECONDS,
    SAVE_FAILURES,
    SELECTION_SECONDS,
    AGGREGATION_SECONDS,
    DOWNLOADED_BYTES,
    REJECTED,
    FAILED,
)


def count_failure(task: str, error: str) -> None:
    """Counts a task's failure; what a site calls its error must not make up labels."""
    known = getattr(errors, error, None)
    own = isinstance(known, type) and issubclass(known, FedhdsError)
    FAILED.labels(task, error if own else "other").inc()
