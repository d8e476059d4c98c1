"""One stage after the other: tasks are given out, results come in, and the stage closes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from google.protobuf.message import Message

from fedhds.tensors.artifact import Artifact
from fedhds_server.run.events import (
    Discard,
    Instruction,
    Record,
    Resolve,
    ResultReceived,
    ResultRejected,
    TaskFailed,
    Wake,
)
from fedhds_server.run.parties import parties, party_of
from fedhds_server.run.quorum import CohortProgress, draw, listed
from fedhds_server.run.secure_round import SecureRound
from fedhds_server.run.state import Phase, Rejection, RunState, Site, Stage, Task, packed, result_digest
from fedhds_server.workflows import TASK_KINDS, WORKFLOWS

# Results of one site that did not pass validation: one may be a passing fault, three are a broken or hostile site.
_QUARANTINE_AFTER = 3


def open_stage(
    state: RunState,
    kind: str,
    cohort: list[str],
    target: int,
    *,
    request: Message | None = None,
    artifact: Artifact | None = None,
    step: int = 0,
    secure: SecureRound | None = None,
) -> None:
    """Opens a stage and gives its cohort their tasks; the answers of `target` parties close it at once.

    `artifact` is what the request stands for, if it is too long for the state.
    """
    text = packed(request) if request is not None else ""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""
    state.stage = Stage(
        kind=kind,
        round_number=state.round_number,
        step=step,
        digest=digest,
        request=text,
        request_artifact=artifact,
        cohort=cohort,
        target=target,
        secure=secure,
    )
    give_tasks(state, cohort)
    if cohort:
        describe(state)


def give_tasks(state: RunState, sites: Iterable[str]) -> None:
    """Gives `sites` the task of the open stage."""
    stage = state.stage
    if stage is not None:
        for site in sites:
            add_task(state, stage.task_id(site), stage.kind, stage.round_number, site)


def add_task(state: RunState, task_id: str, kind: str, round_number: int, site: str) -> None:
    """Opens a task, unless it is open; a result that it had before no longer counts."""
    state.tasks.setdefault(task_id, Task(id=task_id, kind=kind, round_number=round_number, site=site))
    if state.sites[site].last_accepted == task_id:
        state.sites[site].last_accepted = ""
    rejected = state.sites[site].last_rejected
    if rejected and rejected.task_id == task_id:
        state.sites[site].last_rejected = None


def withdraw(state: RunState, *, kind: str | None = None, site: str | None = None) -> None:
    """Drops the open tasks of a kind, or of a site."""
    state.tasks = {
        task.id: task for task in state.tasks.values() if (kind and task.kind != kind) or (site and task.site != site)
    }


def describe(state: RunState) -> None:
    """Says for people what the open stage waits for."""
    progress, stage = CohortProgress.of(state), state.stage
    if progress is not None and stage is not None:
        state.message = f"{progress.workflow.title(state, stage)}: {progress.message}"


def close(state: RunState) -> list[Instruction]:
    """Closes the open stage: what has come counts, and its workflow decides what follows."""
    stage = state.stage
    if stage is None:
        return []
    withdraw(state, kind=stage.kind)
    stage.closed = True
    state.message = WORKFLOWS[stage.kind].closing(state, stage)
    return [Resolve(stage.name), Wake()]


def result_received(state: RunState, event: ResultReceived) -> list[Instruction]:
    """Takes a result, unless it comes too late or twice."""
    task = state.tasks.pop(event.task_id, None)
    if task is None:
        return []
    site = state.sites[task.site]
    site.last_accepted, site.last_result = task.id, result_digest(event.result, event.artifact)
    return TASK_KINDS[task.kind].accept(state, task, event)


def result_rejected(state: RunState, event: ResultRejected) -> list[Instruction]:
    """Counts a result that did not pass validation; the third one of a party puts its sites into quarantine."""
    task = state.tasks.get(event.task_id)
    if task is None:
        return []
    site = state.sites[task.site]
    site.rejections += 1
    site.last_rejected = Rejection(task_id=task.id, reason=event.reason)
    own = state.sites_of(site.party)
    rejections = sum(sibling.rejections for sibling in own)
    if rejections < _QUARANTINE_AFTER:
        return task_failed(state, TaskFailed(event.at, event.task_id, event.reason))
    site.last_error = event.reason
    names = [sibling.name for sibling in own]
    who = f"site {site.name} is" if len(names) == 1 else f"{site.party} with its sites {listed(names)} is"
    note = Record(f"{who} quarantined after {rejections} rejected results ({event.reason})", trouble=True)
    return [note, *quarantine(state, own)]


def quarantine(state: RunState, sites: Iterable[Site]) -> list[Instruction]:
    """Takes all work from sites, and from what is being collected what they delivered."""
    instructions: list[Instruction] = []
    for site in sites:
        site.quarantined = True
        withdraw(state, site=site.name)
        instructions += exclude(state, site.name)
    return instructions


def task_failed(state: RunState, event: TaskFailed) -> list[Instruction]:
    """Notes a failed task; its site is asked again when the stage needs it."""
    task = state.tasks.pop(event.task_id, None)
    if task is None:
        return []
    state.sites[task.site].last_error = event.reason
    if state.stage is not None and task.kind == state.stage.kind:
        state.stage.failed.append(task.site)
    if state.phase is Phase.FINISHING:
        # Asked again whenever its site comes back, it would keep the run from its end.
        state.failed_evaluations.append(task.id)
    return [Record(f"site {task.site} failed its {task.kind} task: {event.reason}", trouble=True)]


def exclude(state: RunState, site: str) -> list[Instruction]:
    """Takes a site and what it delivered out of what is being collected."""
    state.coresets.pop(site, None)
    stage = state.stage
    if stage is None or stage.closed:
        return []
    stage.cohort = [name for name in stage.cohort if name != site]
    stage.target = min(stage.target, len(parties(stage.cohort)))
    if stage.totals:
        # Results are added up as they come: what a site has added stays for this step.
        return []
    reply = stage.replies.pop(site, None)
    return [Discard(reply.artifact)] if reply and reply.artifact else []


def ask_others(state: RunState, progress: CohortProgress, spare: list[str]) -> list[Instruction]:
    """Asks sites that can replace those which are disconnected: the quorum is needed, from whichever sites."""
    stage = state.stage
    if stage is None:
        return []
    answered = parties(progress.answered)
    missing = max(progress.target, progress.quorum) - len(answered)
    spare = [site for site in spare if party_of(site) not in answered]
    others = draw(spare, missing, seed=state.spec.seed, round_number=state.round_number)
    stage.cohort = sorted({*stage.cohort, *others})
    give_tasks(state, others)
    note = waits(state)
    if others:
        return [Record(f"asked in place of {listed(progress.disconnected)}: {listed(others)}"), Wake()]
    return note


def waits(state: RunState) -> list[Instruction]:
    """Says that the stage waits, once for each change of what it waits for."""
    before = state.message
    describe(state)
    return [Record(state.message, trouble=True)] if state.message != before else []


def retry(state: RunState) -> list[Instruction]:
    """Gives failed sites their task again."""
    progress, stage = CohortProgress.of(state), state.stage
    if progress is None or stage is None or not progress.short:
        return []
    again = sorted(site for site in progress.failed if state.sites[site].live)
    stage.failed = [site for site in stage.failed if site not in again]
    give_tasks(state, again)
    describe(state)
    return [Record(f"asked again, as the quorum is not reached: {listed(again)}"), Wake()] if again else []
