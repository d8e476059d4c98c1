"""The I/O shell of the state machine: feeds it events, makes its state durable, carries out its instructions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from google.protobuf import json_format

from fedhds.errors import DamagedArtifact, Evicted, FedhdsError, SessionLost, StorageError
from fedhds.runtime.files import replace_file
from fedhds.telemetry import about
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.safetensors import write_adapter
from fedhds.v1 import federation_pb2 as pb
from fedhds_server.aggregation.base import Aggregator, Update
from fedhds_server.aggregation.weights import bounded_shares
from fedhds_server.artifacts import ArtifactStore
from fedhds_server.checkpoint import write_checkpoint
from fedhds_server.collection import Collection
from fedhds_server.counted import FOLD_SECONDS, SELECTION_SECONDS
from fedhds_server.enrolment import session_digest
from fedhds_server.events import (
    AdapterDrawn,
    Aggregate,
    DeadlineReached,
    Discard,
    DrawAdapter,
    Event,
    Instruction,
    PassOpened,
    Record,
    RetryDue,
    RoundAggregated,
    Select,
    SelectionMade,
    SiteConnected,
    SiteHeard,
    SiteSilent,
    UpdateDamaged,
    Wake,
    WriteCheckpoint,
)
from fedhds_server.report import run_card, run_status
from fedhds_server.rounds import RunMachine
from fedhds_server.selection.base import InterClientSelection, Report, Selection, SelectionContext
from fedhds_server.selection.record import newest_selection, write_selection
from fedhds_server.state import RunState, Site, SiteState, Task
from fedhds_server.store.base import JournalEntry, Store

logger = logging.getLogger(__name__)

# Decides on the state at the instant at which the event is applied, so that checks cannot be overtaken.
Decision = Callable[[RunState], Event | None]

# A full disk is mended by people, in minutes: often enough to go on soon, seldom enough to keep the log readable.
_STORAGE_RETRY_S = 5.0
_JOURNAL_TAIL = 100
# `fedhds status --watch` asks every 2 s; whoever watches is to see the end.
_WATCHED_S = 5.0
_STOPPING = "the coordinator is stopping; try again when it is back"


class Coordinator:
    """Runs one `RunState` over a store, whose lease is held, and an artifact folder.

    `post` returns when the event's effect is durable. Events that arrive together share one transaction.
    """

    def __init__(
        self,
        state: RunState,
        *,
        store: Store,
        artifacts: ArtifactStore,
        folder: Path,
        strategy: InterClientSelection,
        aggregator: Aggregator,
        keep_updates: bool = False,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._folder = folder
        self._strategy = strategy
        self._aggregator = aggregator
        self._keep_updates = keep_updates
        self._machine = RunMachine(state, needs_reports=strategy.needs_reports)
        self._inbox: asyncio.Queue[tuple[Decision, asyncio.Future[None]]] = asyncio.Queue()
        self._work: asyncio.Queue[Instruction] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Event] = {}
        self._heard: dict[str, float] = {name: time.monotonic() for name in state.sites}
        self._sessions = {site.session: name for name, site in state.sites.items()}
        self._settled = asyncio.Event()
        self._applying = asyncio.Lock()
        self._stopped = False
        # Of a former leader, a thread may still be folding into the same folder.
        self._scratch = secrets.token_hex(4)
        # A run that is started again when it is over is there for whoever has not got the adapter.
        self._started_over = state.phase.over
        self._over_since: float | None = None
        self._watched_at = -math.inf
        # Monotonic times of what is open: since when, and since when it is short of its quorum.
        self._opening, self._opened_at = "", 0.0
        self._short_since: float | None = None
        self.newest_selection = newest_selection(folder)
        """The last round of which this run folder has a selection; 0: one for all; None before the first."""
        entries = store.journal()
        self._journal_lines = len(entries)
        self._journal_tail = deque(entries[-_JOURNAL_TAIL:], maxlen=_JOURNAL_TAIL)

    @property
    def artifacts(self) -> ArtifactStore:
        """Where the run's adapters and updates lie."""
        return self._artifacts

    @property
    def journal(self) -> list[tuple[int, JournalEntry]]:
        """The newest lines of the journal with their numbers, which count from 1."""
        first = self._journal_lines - len(self._journal_tail) + 1
        return list(enumerate(self._journal_tail, first))

    @property
    def state(self) -> RunState:
        """The run; to be read, not changed."""
        return self._machine.state

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._folder

    @property
    def deadline_s(self) -> float | None:
        """Seconds until the open selection or round closes with its quorum; None without a deadline."""
        deadline = self.state.spec.deadline
        if not deadline or self.state.opening != self._opening:
            return None
        return max(0.0, self._opened_at + deadline - time.monotonic())

    @property
    def checkpoint(self) -> Path:
        """The PEFT folder of the last global adapter."""
        return self._folder / "checkpoint"

    def watched(self) -> None:
        """Notes that somebody asked for the run's status."""
        self._watched_at = time.monotonic()

    async def run(self) -> None:
        """Works until the run is over and every live site has the final adapter and has left, or until cancelled.

        Raises NotLeading when another coordinator has taken the lease.
        """
        about(lambda: {"run": self.state.run_id})
        for instruction in self._machine.pending():
            self._work.put_nowait(instruction)
        self._settle()
        tasks = [asyncio.create_task(body()) for body in (self._apply_events, self._perform_work, self._watch)]
        waiter = asyncio.create_task(self._settled.wait())
        try:
            done, _ = await asyncio.wait([waiter, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await self._work.join()
        finally:
            # At once, as another may lead by now: nobody may be answered from what this one remembers.
            self._stopped = True
            for event in self._waiting.values():
                event.set()
            # What is being applied is finished, so that whoever waits for it hears; not for ever, on a disk that fails.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._applying.acquire(), _STORAGE_RETRY_S)
            for task in [waiter, *tasks]:
                task.cancel()
            await asyncio.gather(waiter, *tasks, return_exceptions=True)
            while not self._inbox.empty():
                _fail(self._inbox.get_nowait()[1], StorageError(_STOPPING))

    async def post(self, decision: Decision | Event) -> None:
        """Applies an event and returns when its effect is durable; raises what the decision raises."""
        if self._stopped:
            raise StorageError(_STOPPING)
        decide: Decision = decision if callable(decision) else lambda _: decision
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((decide, future))
        await future

    async def site_of(self, session: str) -> Site:
        """The site that holds `session`, noted as alive; raises SessionLost or Evicted."""
        if self._stopped:
            raise StorageError(_STOPPING)
        name = self._sessions.get(session_digest(session))
        if name is None:
            raise SessionLost("the session is unknown, or another process of this site has taken over; enrol again")
        self._heard[name] = time.monotonic()
        site = self.state.sites[name]
        if site.state is SiteState.EVICTED:
            raise Evicted(f"an operator has evicted this site: {site.last_error}")
        if not site.live:
            await self.post(SiteHeard(time.time(), name))
        return site

    async def next_task(self, site: Site, wait_s: float) -> Task | None:
        """The site's open task; None when it has none for `wait_s` seconds, is evicted or the run is over."""
        deadline = time.monotonic() + wait_s
        while not self._dismissed(site.name):
            if self._stopped:
                raise StorageError(_STOPPING)
            task = self._machine.next_task(site.name) if self.state.paused is None else None
            remaining = deadline - time.monotonic()
            if task or remaining <= 0:
                return task
            event = self._waiting[site.name] = asyncio.Event()
            try:
                await asyncio.wait_for(event.wait(), remaining)
            except TimeoutError:
                return None
            finally:
                # Another process of the site may meanwhile wait in the place of this one.
                if self._waiting.get(site.name) is event:
                    del self._waiting[site.name]
        return None

    # Events.

    async def _apply_events(self) -> None:
        while True:
            batch = [await self._inbox.get()]
            try:
                await self._applying.acquire()
            except asyncio.CancelledError:
                _fail(batch[0][1], StorageError(_STOPPING))
                raise
            while not self._inbox.empty():
                batch.append(self._inbox.get_nowait())
            instructions: list[Instruction] = []
            applied: list[asyncio.Future[None]] = []
            for decide, future in batch:
                try:
                    event = decide(self.state)
                    instructions += self._machine.apply(event) if event else []
                except FedhdsError as error:
                    _fail(future, error)
                else:
                    applied.append(future)
                    if isinstance(event, SiteConnected):
                        self._heard[event.site] = time.monotonic()
            instructions += self._machine.advance()
            try:
                await self._commit(instructions, applied)
            finally:
                # Of a commit that was cut short, nobody else would tell those who wait.
                for future in applied:
                    _fail(future, StorageError(_STOPPING))
                self._applying.release()

    async def _commit(self, instructions: list[Instruction], applied: list[asyncio.Future[None]]) -> None:
        records = [instruction for instruction in instructions if isinstance(instruction, Record)]
        entries = [JournalEntry(time.time(), record.message, record.trouble) for record in records]
        try:
            await asyncio.to_thread(self._store.save, self.state, entries)
        except StorageError as error:
            logger.error("%s", error)
            # What is not durable has not happened: back to the saved state, and whoever asked is told.
            self._machine.state = await self._reloaded()
            for future in applied:
                _fail(future, error)
            return
        self._sessions = {site.session: name for name, site in self.state.sites.items()}
        self._journal_tail.extend(entries)
        self._journal_lines += len(entries)
        for record in records:
            logger.log(logging.WARNING if record.trouble else logging.INFO, "%s", record.message)
        for future in applied:
            if not future.done():
                future.set_result(None)
        for instruction in instructions:
            if isinstance(instruction, Wake):
                self._wake()
            elif not isinstance(instruction, Record):
                self._work.put_nowait(instruction)
        self._settle()

    async def _reloaded(self) -> RunState:
        while True:
            try:
                saved = await asyncio.to_thread(self._store.load)
            except StorageError as error:
                logger.error("%s; trying again", error)
            else:
                if saved is None:
                    raise StorageError("the run's state has vanished from the store; restore a backup")
                return saved
            await asyncio.sleep(_STORAGE_RETRY_S)

    def _wake(self) -> None:
        busy = {task.site for task in self.state.tasks.values()}
        for site, event in self._waiting.items():
            if site in busy or self._dismissed(site):
                event.set()

    def _dismissed(self, site: str) -> bool:
        """Whether a site has nothing to wait for any more."""
        return self.state.phase.over or self.state.sites[site].state is SiteState.EVICTED

    def _settle(self) -> None:
        """Ends `run` when every site has the final adapter and has gone; for those away it stays for one patience.

        And for a moment where somebody watches.
        """
        if not self.state.phase.over:
            return
        now = time.monotonic()
        self._over_since = self._over_since or now
        waiting = [site for site in self.state.sites.values() if not site.delivered]
        # A site that has the adapter says goodbye, once it knows that this was noted; until then it may ask again.
        here = any(site.live for site in self.state.sites.values())
        away = any(site.state is SiteState.LOST or self._started_over for site in waiting)
        if now - self._over_since < _WATCHED_S and self._watched_at > self._over_since - _WATCHED_S:
            return
        if not here and (not away or now - self._over_since > self.state.spec.patience):
            self._settled.set()

    async def _watch(self) -> None:
        """Tells the machine what only time tells."""
        spec = self.state.spec
        tick = min(1.0, spec.patience / 5, (spec.deadline or spec.patience) / 5)
        looked = time.monotonic()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            await self._watch_collection(now, now - looked)
            looked = now
            patience = spec.patience
            for site in list(self.state.sites.values()):
                if site.live and now - self._heard.setdefault(site.name, now) > patience:
                    await self.post(SiteSilent(time.time(), site.name))
            if self.state.phase.over:
                # Through the inbox, as the state may be ahead of what is saved.
                await self.post(lambda _: None)

    async def _watch_collection(self, now: float, elapsed: float) -> None:
        state, spec = self.state, self.state.spec
        collection = Collection.of(state)
        if state.opening != self._opening:
            self._opening, self._opened_at, self._short_since = state.opening, now, None
        if collection is None:
            return
        if state.paused is not None:
            self._opened_at += elapsed
            self._short_since = None
            return
        if spec.deadline and not state.deadline_reached and now - self._opened_at >= spec.deadline:
            await self.post(DeadlineReached(time.time(), state.opening))
        if not (collection.short and collection.failed):
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        elif now - self._short_since >= spec.patience:
            self._short_since = None
            await self.post(RetryDue(time.time(), state.opening))

    # Instructions.

    async def _perform_work(self) -> None:
        while True:
            instruction = await self._work.get()
            while True:
                try:
                    await self._perform(instruction)
                    break
                except StorageError as error:
                    logger.error("%s; trying again in %.0f s", error, _STORAGE_RETRY_S)
                    await asyncio.sleep(_STORAGE_RETRY_S)
            self._work.task_done()

    async def _perform(self, instruction: Instruction) -> None:
        match instruction:
            case DrawAdapter():
                artifact = await asyncio.to_thread(self._draw_adapter)
                await self.post(AdapterDrawn(time.time(), artifact))
            # Whatever comes in while it waits here asks for it again: what has been decided is not decided anew.
            case Select() if instruction in self._machine.pending():
                done = self.state.selection_pass
                decided = await asyncio.to_thread(decide, self.state, self._strategy, instruction)
                if isinstance(decided, pb.Centres):
                    await self.post(PassOpened(time.time(), instruction.round, done, decided))
                else:
                    await asyncio.to_thread(self._write_selection, instruction.round, decided)
                    coresets, notes = dict(decided.coresets), tuple(decided.notes)
                    await self.post(SelectionMade(time.time(), instruction.round, coresets, notes))
            case Aggregate() if instruction.round == self.state.round:
                await self._aggregate()
            case Discard(artifact) if artifact not in self._named():
                await asyncio.to_thread(self._artifacts.delete, artifact)
            case WriteCheckpoint() if self.state.adapters:
                await asyncio.to_thread(self._write_checkpoint)
                if self.state.phase.over:
                    # What a crash between a round's result and its deletions left behind, updates of single sites too.
                    keep = {artifact.digest for artifact in self._named()}
                    await asyncio.to_thread(self._artifacts.sweep, keep, over=True)

    def _named(self) -> set[Artifact]:
        return {*self.state.adapters.values(), *(update.artifact for update in self.state.updates.values())}

    def _draw_adapter(self) -> Artifact:
        manifest, spec = self.state.adapter_manifest, self.state.spec
        path = self._artifacts.scratch(f"initial-{self._scratch}")
        artifact = write_adapter(path, manifest, lambda tensor: tensor.initial_value(spec.seed), spec.adapter_dtype)
        self._artifacts.adopt(path, artifact)
        return artifact

    async def _aggregate(self) -> None:
        state = self.state
        spent = [update.artifact for update in state.updates.values()]
        before = set(state.adapters.values())
        for site, reason in (await asyncio.to_thread(self._damaged_updates)).items():
            await self.post(UpdateDamaged(site, reason))
        artifact = await asyncio.to_thread(self._fold)
        await self.post(RoundAggregated(time.time(), artifact))
        kept = set(self.state.adapters.values())
        for old in {*spent, *before} - kept:
            await asyncio.to_thread(self._artifacts.delete, old)

    def _damaged_updates(self) -> dict[str, str]:
        """Of the open round's updates those whose bytes are not what was accepted, and what is wrong with them."""
        damaged = {}
        for site, update in sorted(self.state.updates.items()):
            try:
                self._artifacts.verified(update.artifact)
            except DamagedArtifact as error:
                damaged[site] = str(error)
        return damaged

    @FOLD_SECONDS.time()
    def _fold(self) -> Artifact:
        state = self.state
        current = self._artifacts.verified(state.adapters[max(state.adapters)])
        came = sorted(state.updates.items())
        shares = bounded_shares([update.samples for _, update in came], state.spec.max_weight_share)
        updates = [
            Update(site=site, path=self._artifacts.path(update.artifact), weight=float(share))
            for (site, update), share in zip(came, shares, strict=True)
        ]
        path = self._artifacts.scratch(f"aggregate-{self._scratch}")
        artifact = self._aggregator.aggregate(state.adapter_manifest, current, updates, path, state.spec.adapter_dtype)
        self._artifacts.adopt(path, artifact)
        if self._keep_updates:
            # Before the result is durable: nothing names the updates from then on.
            for site, update in state.updates.items():
                self._artifacts.keep_update(update.artifact, state.round, site)
        return artifact

    def _write_selection(self, number: int, selection: Selection) -> None:
        spec, run_id = self.state.spec, self.state.run_id
        write_selection(self._folder, selection, run_id=run_id, number=number, strategy=spec.strategy)
        self.newest_selection = number

    def _write_checkpoint(self) -> None:
        state = self.state
        newest = state.adapters[max(state.adapters)]
        config = state.adapter_manifest.config
        write_checkpoint(self._folder, self._artifacts.verified(newest), config, run_card(state))
        report = json_format.MessageToJson(
            run_status(state, self.checkpoint),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        replace_file(self._folder / "report.json", report)


@SELECTION_SECONDS.time()
def decide(state: RunState, strategy: InterClientSelection, instruction: Select) -> Selection | pb.Centres:
    """What the strategy makes of the reports that the state holds."""
    rows = {site: state.sites[site].rows for site in instruction.sites}
    budget = state.spec.budget_of(sum(rows.values()))
    context = SelectionContext(
        seed=state.spec.seed,
        round=instruction.round,
        rows=rows,
        budget=budget,
        spec=state.spec,
        passes=state.selection_pass,
        centres=state.centres_now,
        cells=state.cells_now,
    )
    answered = [site for site in instruction.sites if site in state.report_tasks]
    if state.cells:
        reports = {site: Report(state.report_tasks[site], cells=state.cells_of(site)) for site in answered}
    else:
        reports = {site: Report(state.report_tasks[site], state.clusters_of(site)) for site in answered}
    return strategy.select(context, reports)


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
