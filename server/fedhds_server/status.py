"""What the coordinator tells people about a run: the status message, and what the model card is made of."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

from fedhds import PROTOCOL_VERSIONS, __version__
from fedhds.fingerprint import combined
from fedhds.v2 import status_pb2
from fedhds_server.run.activity import activity
from fedhds_server.run.messages import for_site
from fedhds_server.run.parties import parties, party_of
from fedhds_server.run.quorum import CohortProgress
from fedhds_server.run.state import Evaluation, MetricSum, RunState, Site, SiteState, UpdateScore
from fedhds_server.storage.base import JournalEntry
from fedhds_server.storage.checkpoint import BEST
from fedhds_server.storage.model_card import CardFacts, model_card

Item = TypeVar("Item")


def means_of(sums: Mapping[str, Evaluation]) -> tuple[int, dict[str, float]]:
    """Rows, and means by metric, of one evaluation over its evaluators' sums."""
    by_name: dict[str, list[MetricSum]] = {}
    for part in sums.values():
        for name, metric in part.metrics.items():
            by_name.setdefault(name, []).append(metric)
    means = {
        # Rounded once, so that the order of arrival does not matter.
        name: math.fsum(metric.value_sum for metric in metrics) / math.fsum(metric.weight for metric in metrics)
        for name, metrics in sorted(by_name.items())
    }
    return sum(part.rows for part in sums.values()), means


def medians_of(sums: Mapping[str, Evaluation]) -> tuple[int, dict[str, float]]:
    """Evaluators, and medians by metric of their own means; the sites of one certificate are one evaluator.

    Where the mean is what most rows say, no minority of evaluators moves the median far.
    """
    by_party: dict[str, dict[str, Evaluation]] = {}
    for site, part in sums.items():
        by_party.setdefault(party_of(site), {})[site] = part
    values: dict[str, list[float]] = {}
    for own in by_party.values():
        for name, mean in means_of(own)[1].items():
            values.setdefault(name, []).append(mean)
    return len(by_party), {name: median(known) for name, known in sorted(values.items())}


def status_of(
    state: RunState,
    checkpoint: Path,
    journal: Sequence[tuple[int, JournalEntry]] = (),
    *,
    deadline_s: float | None = None,
    warnings: Sequence[str] = (),
    limit: int | None = None,
) -> status_pb2.GetStatusResponse:
    """The run at this instant, with numbered lines of its journal.

    `deadline_s`: until the open stage closes with its quorum. With a `limit` it is abridged: that many sites, those
    with trouble first, then those at work; at most that many rounds and evaluations, evenly spaced, with the first and
    the last; no contributors by name.
    """
    status = status_pb2.GetStatusResponse(
        run_id=state.run_id,
        phase=activity(state),
        round_number=state.round_number,
        message=state.message,
        spec=state.spec.model_dump_json(),
        running_s=(state.ended_at or time.time()) - state.started_at if state.started_at else 0.0,
        bytes_received=sum(site.bytes_received for site in state.sites.values()),
        checkpoint=str(checkpoint) if checkpoint.exists() else "",
        trained_rows=state.trained_rows,
        pool_rows=state.pool_rows,
        now=time.time(),
        fedhds_version=__version__,
        protocol_versions=PROTOCOL_VERSIONS,
        site_states=Counter(map(_state_name, state.sites.values())),
        model_fingerprint=combined(state.fingerprint),
        model_given_by=state.model_given_by,
        model_confirmed=bool(state.expected_fingerprint),
        warnings=warnings,
    )
    # The first of every site; not a search per site, which takes minutes for ten thousand.
    tasks = {task.site: task.kind for task in reversed(state.tasks.values())}
    sites = list(state.sites.values())
    if limit is not None and len(sites) > limit:
        sites = heapq.nsmallest(limit, sites, key=lambda site: (not _trouble(site), site.name not in tasks, site.name))
    scores = {site: score for closed in state.closed_rounds for site, score in closed.updates.items()}
    for site in sorted(sites, key=lambda site: site.name):
        score = scores.get(site.name)
        status.sites.add(
            last_update=_score(score) if score else None,
            site=site.name,
            state=_state_name(site),
            rows=site.rows,
            evaluates=site.evaluates,
            task=tasks.get(site.name, ""),
            last_error=site.last_error,
            bytes_received=site.bytes_received,
            delivered=site.delivered,
            rejections=site.rejections,
            validates=site.validates,
        )
    for closed in _spaced(state.closed_rounds, limit, first=1):
        status.closed_rounds.add(
            round_number=closed.round_number,
            contributors=sorted(closed.contributions) if limit is None else (),
            contributor_count=len(closed.contributions),
            samples=closed.samples,
            loss=closed.loss,
            seconds=closed.seconds,
            product_gap=closed.product_gap,
            unchanged=closed.unchanged,
            updates={site: _score(score) for site, score in closed.updates.items()} if limit is None else None,
        )
    for measured, lines in ((state.evaluations, status.evaluations), (state.validations, status.validations)):
        for number in _spaced(sorted(measured), limit, first=0):
            rows, means = means_of(measured[number])
            evaluators, medians = medians_of(measured[number])
            lines.add(round_number=number, rows=rows, metrics=means, medians=medians, evaluators=evaluators)
    if state.best_round is not None:
        status.best_round, best = state.best_round, checkpoint.parent / BEST
        status.best_checkpoint = str(best) if best.exists() else ""
    for number, entry in journal:
        status.journal.add(number=number, at=entry.at, message=entry.message, trouble=entry.trouble)
    if state.paused is not None:
        status.paused = state.paused
    if progress := CohortProgress.of(state):
        groups = ("answered", "working", "failed", "disconnected")
        status.cohort.CopyFrom(
            status_pb2.CohortProgress(
                task=progress.workflow.kind,
                target=progress.target,
                quorum=progress.quorum,
                deadline_s=deadline_s,
                **{name: len(parties(getattr(progress, name))) for name in groups},
            )
        )
    return status


def site_status_of(state: RunState, party: str) -> status_pb2.GetStatusResponse:
    """What concerns the sites of a party: where the run stands, and their own rows; of no party: no site at all."""
    whole, own = status_of(state, Path("")), {name for name in state.sites if party and party_of(name) == party}
    status = status_pb2.GetStatusResponse(
        **{field: getattr(whole, field) for field in _PUBLIC_FIELDS},
        message=for_site(state, min(own, default="")),
        bytes_received=sum(state.sites[name].bytes_received for name in own),
        sites=[site for site in whole.sites if site.site in own],
    )
    for closed in whole.closed_rounds:
        status.closed_rounds.add().CopyFrom(closed)
        status.closed_rounds[-1].contributors[:] = sorted(own.intersection(closed.contributors))
        for name in closed.updates.keys() - own:
            del status.closed_rounds[-1].updates[name]
    if whole.HasField("best_round"):
        status.best_round = whole.best_round
    if whole.HasField("paused"):
        status.paused = whole.paused
    return status


# Of GetStatusResponse: what every site hears in the course of the run.
_PUBLIC_FIELDS = (
    *("run_id", "phase", "round_number", "spec", "running_s", "now", "fedhds_version", "protocol_versions"),
    *("trained_rows", "pool_rows", "evaluations", "validations", "site_states"),
)


def _score(score: UpdateScore) -> status_pb2.UpdateScore:
    return status_pb2.UpdateScore(norm=score.norm, distance=score.distance, cosine=score.cosine)


def _state_name(site: Site) -> str:
    return "quarantined" if site.quarantined and site.live else site.state.value


def _trouble(site: Site) -> bool:
    return bool(site.last_error or site.rejections or site.quarantined) or site.state is SiteState.LOST


def _spaced(items: Sequence[Item], limit: int | None, *, first: int) -> Sequence[Item]:
    """All, or at most `limit`: the ends, and of those in between, counted from `first`, every 2nd, 4th, 8th, ...

    Powers of two, so that what is left out stays out while the run goes on.
    """
    if limit is None or len(items) <= limit:
        return items
    step = 1
    while len(items) > step * (limit - 2):
        step *= 2
    ends = (first, first + len(items) - 1)
    return [item for at, item in enumerate(items, first) if at % step == 0 or at in ends]


def model_card_of(state: RunState, round_number: int | None = None) -> str:
    """The model card of the global adapter of a round, by default of the last one."""
    if round_number is not None:
        closed_rounds = [closed for closed in state.closed_rounds if closed.round_number <= round_number]
        state = state.model_copy(update={"closed_rounds": closed_rounds})
    contributors = {site for closed in state.closed_rounds for site in closed.contributions}
    facts = CardFacts(
        # The round that is open has no part in the adapter yet.
        rounds=len(state.closed_rounds),
        sites=len(parties(contributors)),
        rows=state.pool_rows,
        samples=state.trained_rows,
        fingerprint=state.fingerprint,
        version=__version__,
        evaluations={number: means_of(sums) for number, sums in sorted(state.evaluations.items())},
        medians={number: medians_of(sums)[1] for number, sums in state.evaluations.items() if len(parties(sums)) > 1},
        validations={number: means_of(sums) for number, sums in sorted(state.validations.items())},
        best_round=state.best_round,
        stop_tokens=state.adapter_manifest.stop_tokens if state.manifest else (),
    )
    return model_card(state.spec, facts)
