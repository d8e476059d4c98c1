"""A coordinator's metrics: read off the run's state at the scrape, in time that grows with the sites and no more.

No label holds a site's name: the series of a run are as many with ten sites as with ten thousand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric

from fedhds import __version__
from fedhds.metrics import Measure
from fedhds_server.collection import Collection
from fedhds_server.readiness import Readiness, disk_needed
from fedhds_server.report import mean_of
from fedhds_server.state import Phase, RunState, SiteState
from fedhds_server.term import PROBLEMS

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
ROUNDS = _gauge("fedhds_rounds_wanted", "Rounds that the run is to have.")
ROUNDS_CLOSED = _counter("fedhds_rounds_closed_total", "Rounds that are closed.")
ROUND_SECONDS = _counter("fedhds_round_seconds_total", "Duration of all closed rounds.")
LAST_ROUND = _gauge("fedhds_last_round_seconds", "Duration of the last closed round.")
TRAINING_LOSS = _gauge("fedhds_training_loss", "Mean training loss of the last round that had an update.")
IDLE = _gauge(
    "fedhds_since_progress_seconds",
    "Time since the run last moved (a phase, pass or round, an answer, an evaluation, a new site).",
)
COHORT = _gauge("fedhds_cohort_sites", "Sites that the open selection or round has asked.")
COLLECTED = _gauge(
    "fedhds_collection_sites",
    "The cohort by what its sites have done: answered, working, away (lost or left), failed (or rejected).",
    "state",
)
TARGET = _gauge("fedhds_collection_target", "Answers that close the open selection or round at once.")
QUORUM = _gauge("fedhds_collection_quorum", "Least answers that close it at all.")
SHORT = _gauge(
    "fedhds_short_of_quorum_seconds",
    "For how long the open selection or round has lacked its quorum with nobody at work on it; 0: it does not.",
)
SITES = _gauge("fedhds_sites", "Sites by state; live are connecting and enrolled.", "state")
QUARANTINED = _gauge("fedhds_sites_quarantined", "Sites whose results are taken no more, after repeated rejections.")
SITES_WANTED = _gauge("fedhds_sites_wanted", "Sites that the run waits for before it starts.")
TASKS = _gauge("fedhds_tasks_open", "Tasks that are not completed, failed or withdrawn.")
ROWS = _gauge("fedhds_pool_rows", "Training rows that all sites declared.")
ACCEPTED = _counter("fedhds_updates_accepted_total", "Updates taken, over the whole run.")
RECEIVED = _counter("fedhds_received_bytes_total", "Bytes of sites' calls, uploads included, over the whole run.")
EVALUATION_ROUND = _gauge("fedhds_evaluation_round", "The round of the last evaluation; 0: before the first.")
EVALUATION_LOSS = _gauge("fedhds_evaluation_loss", "Loss on held-out rows in the last evaluation, nats per token.")
EVALUATION_ROUGE = _gauge("fedhds_evaluation_rouge_l", "Rouge-L F1 on held-out rows in the last evaluation.")
MEASURES = tuple(_MEASURES.values())


def run_families(readiness: Readiness) -> list[Metric]:
    """All of `MEASURES`; without samples what only the leader knows, while this process does not lead."""
    problems, state = readiness.term.problems, readiness.state
    told = [
        LEADING.of(float(state is not None)),
        READY.of(float(not problems)),
        PROBLEM.of({kind: float(kind in problems) for kind in PROBLEMS}),
        DISK_FREE.of(readiness.disk_free),
        DISK_NEEDED.of(disk_needed(state)),
    ]
    if state:
        told += [*_of_run(state, readiness), *_of_collection(state), *_of_sites(state)]
    names = {family.name for family in told}
    return [*told, *(empty for measure in MEASURES if (empty := measure.of(None)).name not in names)]


def _of_run(state: RunState, readiness: Readiness) -> Iterator[Metric]:
    named: tuple[str, ...] = (state.run_id, state.spec.strategy, __version__)
    yield RUN.of({named: 1.0})
    yield PHASE.of({phase.value: float(phase is state.phase) for phase in Phase})
    yield PAUSED.of(float(state.paused is not None))
    yield ROUND.of(state.round)
    yield ROUNDS.of(state.spec.rounds)
    yield ROUNDS_CLOSED.of(len(state.closed_rounds))
    yield ROUND_SECONDS.of(sum(closed.seconds for closed in state.closed_rounds))
    yield LAST_ROUND.of(state.closed_rounds[-1].seconds if state.closed_rounds else None)
    trained = next((closed for closed in reversed(state.closed_rounds) if closed.contributions), None)
    yield TRAINING_LOSS.of(trained.loss if trained else None)
    yield IDLE.of(readiness.idle_s)
    # Those of closed rounds, and of the open one.
    yield ACCEPTED.of(sum(len(closed.contributions) for closed in state.closed_rounds) + len(state.updates))
    newest = max(state.evaluations, default=None)
    _, loss, rouge = mean_of(state.evaluations[newest]) if newest is not None else (0, None, None)
    yield EVALUATION_ROUND.of(newest)
    yield EVALUATION_LOSS.of(loss)
    yield EVALUATION_ROUGE.of(rouge)
    yield SHORT.of(readiness.short_s)


def _of_collection(state: RunState) -> Iterator[Metric]:
    collection = Collection.of(state)
    yield COHORT.of(len(state.cohort) if collection else 0)
    yield TARGET.of(collection.target if collection else 0)
    yield QUORUM.of(collection.quorum if collection else 0)
    groups = ("answered", "working", "away", "failed")
    yield COLLECTED.of({name: len(getattr(collection, name)) if collection else 0 for name in groups})


def _of_sites(state: RunState) -> Iterator[Metric]:
    states = Counter(site.state for site in state.sites.values())
    yield SITES.of({name.value: states[name] for name in SiteState})
    yield QUARANTINED.of(sum(site.quarantined for site in state.sites.values()))
    yield SITES_WANTED.of(state.spec.min_sites)
    yield TASKS.of(len(state.tasks))
    yield ROWS.of(state.pool_rows)
    yield RECEIVED.of(sum(site.bytes_received for site in state.sites.values()))
