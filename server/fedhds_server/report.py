"""What the coordinator tells people about a run: the status message and the model card's facts."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fedhds import PROTOCOL_VERSIONS, __version__
from fedhds.v1 import federation_pb2 as pb
from fedhds_server.checkpoint import EvaluationFacts, RunFacts, model_card
from fedhds_server.collection import Collection
from fedhds_server.state import Evaluation, RunState, Site, SiteState
from fedhds_server.store.base import JournalEntry

Item = TypeVar("Item")


def mean_evaluations(state: RunState) -> dict[int, tuple[int, float, float]]:
    """Per round: rows, mean loss per response token in nats, mean Rouge-L F1, over all evaluators' sums."""
    return {number: mean_of(sums) for number, sums in sorted(state.evaluations.items())}


def mean_of(sums: Mapping[str, Evaluation]) -> tuple[int, float, float]:
    """Rows, mean loss per response token in nats, mean Rouge-L F1 of one evaluation, over its evaluators."""
    parts = list(sums.values())
    rows, tokens = sum(part.rows for part in parts), sum(part.tokens for part in parts)
    loss, rouge = sum(part.loss_sum for part in parts), sum(part.rouge_l_sum for part in parts)
    return rows, loss / max(tokens, 1), rouge / max(rows, 1)


def run_status(
    state: RunState,
    checkpoint: Path,
    journal: Sequence[tuple[int, JournalEntry]] = (),
    *,
    deadline_s: float | None = None,
    most: int | None = None,
) -> pb.GetStatusResponse:
    """The run at this instant, with numbered lines of its journal.

    `deadline_s`: until the open selection or round closes with its quorum. With `most` it is abridged: so many sites,
    those that somebody should look at first, then those at work; so many rounds and evaluations or fewer, evenly
    spaced, with the first and the last; nobody's contributors by name.
    """
    status = pb.GetStatusResponse(
        run_id=state.run_id,
        phase=state.phase.value,
        round=state.round,
        message=state.message,
        run=state.spec.to_proto(),
        running_s=(state.ended_at or time.time()) - state.started_at if state.started_at else 0.0,
        bytes_received=sum(site.bytes_received for site in state.sites.values()),
        checkpoint=str(checkpoint) if checkpoint.exists() else "",
        trained_rows=state.trained_rows,
        pool_rows=state.pool_rows,
        now=time.time(),
        fedhds_version=__version__,
        protocol_versions=PROTOCOL_VERSIONS,
        site_states=Counter(map(_told_state, state.sites.values())),
    )
    # The first of every site; not a search per site, which takes minutes for ten thousand.
    tasks = {task.site: task.kind.value for task in reversed(state.tasks.values())}
    sites = list(state.sites.values())
    if most is not None and len(sites) > most:
        sites = heapq.nsmallest(most, sites, key=lambda site: (not _trouble(site), site.name not in tasks, site.name))
    for site in sorted(sites, key=lambda site: site.name):
        status.sites.add(
            site=site.name,
            state=_told_state(site),
            rows=site.rows,
            evaluates=site.evaluates,
            task=tasks.get(site.name, ""),
            last_error=site.last_error,
            bytes_received=site.bytes_received,
            delivered=site.delivered,
            rejections=site.rejections,
        )
    for closed in _spaced(state.closed_rounds, most, first=1):
        status.closed_rounds.add(
            round=closed.round,
            contributors=sorted(closed.contributions) if most is None else (),
            contributor_count=len(closed.contributions),
            samples=closed.samples,
            loss=closed.loss,
            seconds=closed.seconds,
        )
    for number in _spaced(sorted(state.evaluations), most, first=0):
        rows, loss, rouge = mean_of(state.evaluations[number])
        status.evaluations.add(round=number, rows=rows, loss=loss, rouge_l=rouge)
    for number, entry in journal:
        status.journal.add(number=number, at=entry.at, message=entry.message, trouble=entry.trouble)
    if state.paused is not None:
        status.paused = state.paused
    if collection := Collection.of(state):
        groups = ("answered", "working", "failed", "away")
        status.collection.CopyFrom(
            pb.CollectionStatus(
                task=collection.kind.value,
                target=collection.target,
                quorum=collection.quorum,
                deadline_s=deadline_s,
                **{name: len(getattr(collection, name)) for name in groups},
            )
        )
    return status


def _told_state(site: Site) -> str:
    return "quarantined" if site.quarantined and site.live else site.state.value


def _trouble(site: Site) -> bool:
    return bool(site.last_error or site.rejections or site.quarantined) or site.state is SiteState.LOST


def _spaced(items: Sequence[Item], most: int | None, *, first: int) -> Sequence[Item]:
    """All, or `most` at the utmost: the ends, and of those in between, counted from `first`, every 2nd, 4th, 8th, ...

    Powers of two, so that what is left out stays out while the run goes on.
    """
    if most is None or len(items) <= most:
        return items
    step = 1
    while len(items) > step * (most - 2):
        step *= 2
    ends = (first, first + len(items) - 1)
    return [item for at, item in enumerate(items, first) if at % step == 0 or at in ends]


def run_card(state: RunState) -> str:
    """The model card of the last global adapter."""
    contributors = {site for closed in state.closed_rounds for site in closed.contributions}
    facts = RunFacts(
        rounds=state.round if state.closed_rounds else 0,
        sites=len(contributors),
        rows=state.pool_rows,
        samples=state.trained_rows,
        fingerprint=state.fingerprint,
        version=__version__,
        evaluations=tuple(
            EvaluationFacts(round=number, rows=rows, loss=loss, rouge_l=rouge)
            for number, (rows, loss, rouge) in mean_evaluations(state).items()
        ),
    )
    return model_card(state.spec, facts)
