"""A coordinator's metrics: read off the run's state at the scrape, in time that grows with the sites and no more.

No label holds a site's name: the series of a run are as many with ten sites as with ten thousand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric

from fedhds import __version__
from fedhds.runtime.metrics import Measure
from fedhds_server.leadership.gate import PROBLEMS
from fedhds_server.leadership.readiness import Readiness, disk_needed
from fedhds_server.run.activity import activities, activity
from fedhds_server.run.parties import parties
from fedhds_server.run.quorum import CohortProgress
from fedhds_server.run.state import RunState, SiteState
from fedhds_server.status import means_of

_MEASURES: dict[str, Measure] = {}


def _gauge(name: str, meaning: str, *labels: str) -> Measure:
    return _MEASURES.setdefault(name, Measure(name, "gauge", meaning, labels))


def _counter(name: str, meaning: str) -> Measure:
    return _MEASURES.setdefault(name, Measure(name, "counter", meaning))


LEADING = _gauge("fedhds_leading", "1 while this process leads, 0 while it stands by; the run is its leader's to tell.")
READY = _gauge("fedhds_ready", "1 while this process is ready, as /readyz and gRPC health say.")
PROBLEM = _gauge("fedhds_not_ready", "1 for each kind of problem that keeps this process from being ready.", "problem")
DISK_FREE = _gauge("fedhds_disk_free_bytes", "Room where it is tightest: the run folder or the artifacts' folder.")
DISK_NEEDED = _gauge("fedhds_disk_needed_bytes", "Room below which this process is not ready: what a round may write.")
RUN = _gauge("fedhds_run_info", "1, with what names the run.", "run_id", "strategy", "version")
PHASE = _gauge("fedhds_run_phase", "1 for the phase in which the run is, 0 for the others.", "phase")
PAUSED = _gauge("fedhds_run_paused", "1 while an operator's pause lasts.")
ROUND = _gauge("fedhds_round", "The open round, or the last one; 0 before the first.")
ROUNDS = _gauge("fedhds_rounds_planned", "Rounds that the run has in all.")
ROUNDS_CLOSED = _counter("fedhds_rounds_closed_total", "Rounds that are closed.")
ROUND_SECONDS = _counter("fedhds_round_seconds_total", "Duration of all closed rounds.")
LAST_ROUND = _gauge("fedhds_last_round_seconds", "Duration of the last closed round.")
TRAINING_LOSS = _gauge("fedhds_training_loss", "Mean training loss of the last round that had an update.")
PRODUCT_GAP = _gauge(
    "fedhds_product_gap",
    "How far the mean of LoRA's factors was from the mean of their products in the last round, relative to the latter.",
)
UPDATE_DISTANCE = _gauge(
    "fedhds_update_distance_max",
    "The largest median distance of an update to the others of the last round, over the median of these.",
)
UPDATE_COSINE = _gauge(
    "fedhds_update_cosine_min",
    "The least cosine between what an update of the last round changes and what the others change together.",
)
IDLE = _gauge(
    "fedhds_since_progress_seconds",
    "Time since the run last moved (a phase, stage or round, an answer, an evaluation, a new site).",
)
COHORT = _gauge("fedhds_cohort_sites", "Sites that the open stage has asked.")
PROGRESS = _gauge(
    "fedhds_cohort_progress_sites",
    "The cohort by what its sites have done: answered, working, disconnected (lost or left), failed (or rejected).",
    "state",
)
TARGET = _gauge("fedhds_cohort_target", "Answers that close the open stage at once.")
QUORUM = _gauge("fedhds_cohort_quorum", "Fewest answers that close it at all.")
SHORT = _gauge(
    "fedhds_short_of_quorum_seconds",
    "For how long the open stage has lacked its quorum with no site at work on it; 0: it does not.",
)
SITES = _gauge("fedhds_sites", "Sites by state; live are connecting and enrolled.", "state")
QUARANTINED = _gauge("fedhds_sites_quarantined", "Sites whose results are taken no more, after repeated rejections.")
MIN_SITES = _gauge("fedhds_min_sites", "Sites that the run waits for before it starts.")
TASKS = _gauge("fedhds_tasks_open", "Tasks that are not completed, failed or withdrawn.")
ROWS = _gauge("fedhds_pool_rows", "Training rows that all sites declared.")
ACCEPTED = _counter("fedhds_updates_accepted_total", "Updates taken, over the whole run.")
RECEIVED = _counter("fedhds_received_bytes_total", "Bytes of sites' calls, uploads included, over the whole run.")
EVALUATION_ROUND = _gauge("fedhds_evaluation_round", "The round of the last evaluation; 0: before the first.")
EVALUATION = _gauge(
    "fedhds_evaluation",
    "Means on held-out rows in the last evaluation: loss (nats per response token), rouge_l, ...",
    "metric",
)
MEASURES = tuple(_MEASURES.values())


def run_families(readiness: Readiness) -> list[Metric]:
    """All of `MEASURES`; without samples what only the leader knows, while this process does not lead."""
    problems, state = readiness.gate.problems, readiness.state
    families = [
        LEADING.of(float(state is not None)),
        READY.of(float(not problems)),
        PROBLEM.of({kind: float(kind in problems) for kind in PROBLEMS}),
        DISK_FREE.of(readiness.disk_free),
        DISK_NEEDED.of(disk_needed(state)),
    ]
    if state:
        families += [*_of_run(state, readiness), *_of_cohort(state), *_of_sites(state)]
    names = {family.name for family in families}
    return [*families, *(empty for measure in MEASURES if (empty := measure.of(None)).name not in names)]


def _of_run(state: RunState, readiness: Readiness) -> Iterator[Metric]:
    named: tuple[str, ...] = (state.run_id, state.spec.selection.strategy.name, __version__)
    yield RUN.of({named: 1.0})
    now = activity(state)
    yield PHASE.of({phase: float(phase == now) for phase in activities()})
    yield PAUSED.of(float(state.paused is not None))
    yield ROUND.of(state.round_number)
    yield ROUNDS.of(state.spec.rounds.count)
    yield ROUNDS_CLOSED.of(len(state.closed_rounds))
    yield ROUND_SECONDS.of(sum(closed.seconds for closed in state.closed_rounds))
    yield LAST_ROUND.of(state.closed_rounds[-1].seconds if state.closed_rounds else None)
    trained = next((closed for closed in reversed(state.closed_rounds) if closed.contributions), None)
    yield TRAINING_LOSS.of(trained.loss if trained else None)
    last = state.closed_rounds[-1] if state.closed_rounds else None
    yield PRODUCT_GAP.of(last.product_gap if last else None)
    scores = last.updates.values() if last else ()
    yield UPDATE_DISTANCE.of(max((at.distance for at in scores if at.distance is not None), default=None))
    yield UPDATE_COSINE.of(min((at.cosine for at in scores if at.cosine is not None), default=None))
    yield IDLE.of(readiness.idle_s)
    # Those of closed rounds, and of the open one.
    accepted = sum(len(closed.contributions) for closed in state.closed_rounds)
    yield ACCEPTED.of(accepted + (len(state.stage.uploads) if state.stage else 0))
    newest = max(state.evaluations, default=None)
    yield EVALUATION_ROUND.of(newest)
    yield EVALUATION.of(means_of(state.evaluations[newest])[1] if newest is not None else None)
    yield SHORT.of(readiness.short_s)


def _of_cohort(state: RunState) -> Iterator[Metric]:
    progress = CohortProgress.of(state)
    yield COHORT.of(len(parties(state.stage.cohort)) if state.stage and progress else 0)
    yield TARGET.of(progress.target if progress else 0)
    yield QUORUM.of(progress.quorum if progress else 0)
    groups = ("answered", "working", "disconnected", "failed")
    yield PROGRESS.of({name: len(parties(getattr(progress, name))) if progress else 0 for name in groups})


def _of_sites(state: RunState) -> Iterator[Metric]:
    states = Counter(site.state for site in state.sites.values())
    yield SITES.of({name.value: states[name] for name in SiteState})
    yield QUARANTINED.of(sum(site.quarantined for site in state.sites.values()))
    yield MIN_SITES.of(state.spec.rounds.min_sites)
    yield TASKS.of(len(state.tasks))
    yield ROWS.of(state.pool_rows)
    yield RECEIVED.of(sum(site.bytes_received for site in state.sites.values()))
