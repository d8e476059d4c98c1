"""What the coordinator tells people about a run: the status message and the model card's facts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedhds import PROTOCOL_VERSIONS, __version__
from fedhds.v1 import federation_pb2 as pb
from fedhds_server.checkpoint import EvaluationFacts, RunFacts, model_card
from fedhds_server.state import Evaluation, RunState
from fedhds_server.store.base import JournalEntry


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
    state: RunState, checkpoint: Path, journal: Sequence[tuple[int, JournalEntry]] = ()
) -> pb.GetStatusResponse:
    """The run at this instant, with numbered lines of its journal."""
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
    )
    # The first of every site; not a search per site, which takes minutes for ten thousand.
    tasks = {task.site: task.kind.value for task in reversed(state.tasks.values())}
    for name, site in sorted(state.sites.items()):
        status.sites.add(
            site=name,
            state="quarantined" if site.quarantined and site.live else site.state.value,
            rows=site.rows,
            evaluates=site.evaluates,
            task=tasks.get(name, ""),
            last_error=site.last_error,
            bytes_received=site.bytes_received,
            delivered=site.delivered,
            rejections=site.rejections,
        )
    for closed in state.closed_rounds:
        status.closed_rounds.add(
            round=closed.round,
            contributors=sorted(closed.contributions),
            samples=closed.samples,
            loss=closed.loss,
            seconds=closed.seconds,
        )
    for number, (rows, loss, rouge) in mean_evaluations(state).items():
        status.evaluations.add(round=number, rows=rows, loss=loss, rouge_l=rouge)
    for number, entry in journal:
        status.journal.add(number=number, at=entry.at, message=entry.message, trouble=entry.trouble)
    if state.paused is not None:
        status.paused = state.paused
    return status


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
