"""The commit loop: events that arrive together change the state, which is saved before anybody is answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from fedhds.errors import FedhdsError, StorageError
from fedhds.runtime.logging import about
from fedhds_server.coordinator.admission import Admission
from fedhds_server.coordinator.effects import Effects, run_failed
from fedhds_server.coordinator.presence import STOPPING, Presence
from fedhds_server.coordinator.timers import Timers
from fedhds_server.coordinator.uploads import Uploads
from fedhds_server.observers.base import Observers, RunObserver
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import Event, Instruction, Record, SiteConnected, Wake
from fedhds_server.run.state import RunState
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.storage.base import JournalEntry, Store

logger = logging.getLogger(__name__)

# Decides on the state at the instant at which the event is applied, so that checks cannot be overtaken.
Decision = Callable[[RunState], Event | None]

# People free a full disk in minutes: often enough to go on soon, seldom enough to keep the log readable.
_STORAGE_RETRY_S = 5.0
_JOURNAL_TAIL = 100


class Coordinator:
    """Runs one `RunState` over a store, whose lease it holds, and an artifact folder.

    `post` returns when the event's effect is durable. Events that arrive together share one transaction.
    """

    def __init__(
        self,
        state: RunState,
        *,
        store: Store,
        artifacts: ArtifactStore,
        folder: Path,
        observers: Sequence[RunObserver] = (),
        keep_updates: bool = False,
        admission: Admission | None = None,
    ) -> None:
        self._store = store
        self._machine = RunMachine(state)
        self._inbox: asyncio.Queue[tuple[Decision, asyncio.Future[None]]] = asyncio.Queue()
        self._applying = asyncio.Lock()
        self._stopped = False
        self.artifacts = artifacts
        """Where the run's adapters and updates are."""
        self.folder = folder
        """The run folder."""
        self.uploads = Uploads(self)
        """What sites are sending."""
        self.reading_long = asyncio.Semaphore(1)
        """To be taken while a long result is read, which takes several times its bytes of memory."""
        self.admission = admission or Admission()
        """Whom the operator lets in."""
        self.presence = Presence(self)
        """Which sites are here, and whose long polls wait."""
        self.timers = Timers(self)
        """What only time tells."""
        self.effects = Effects(self, keep_updates=keep_updates)
        """What the machine's instructions do."""
        self._observers = Observers(observers)
        entries = store.journal()
        self._journal_lines = len(entries)
        self._journal_tail = deque(entries[-_JOURNAL_TAIL:], maxlen=_JOURNAL_TAIL)

    @property
    def machine(self) -> RunMachine:
        """The state machine; to be asked, not fed: that is what `post` is for."""
        return self._machine

    @property
    def state(self) -> RunState:
        """The run; to be read, not changed."""
        return self._machine.state

    @property
    def stopped(self) -> bool:
        """Whether this coordinator answers nobody any more."""
        return self._stopped

    @property
    def journal(self) -> list[tuple[int, JournalEntry]]:
        """The newest lines of the journal with their numbers, which count from 1."""
        first = self._journal_lines - len(self._journal_tail) + 1
        return list(enumerate(self._journal_tail, first))

    @property
    def checkpoint(self) -> Path:
        """The PEFT folder of the last global adapter."""
        return self.folder / "checkpoint"

    @property
    def warnings(self) -> list[str]:
        """What the operator should fix while the run goes on."""
        return self.admission.warnings

    async def run(self) -> None:
        """Works until the run is over and every live site has the final adapter and has left, or until cancelled.

        Raises NotLeading when another coordinator has taken the lease.
        """
        about(lambda: {"run": self.state.run_id})
        self._observers.started(self.state)
        self.effects.start(self._machine.pending())
        self.timers.settle()
        bodies = (self._apply_events, self.effects.run, self.timers.run)
        tasks = [asyncio.create_task(body()) for body in bodies]
        waiter = asyncio.create_task(self.timers.settled.wait())
        try:
            done, _ = await asyncio.wait([waiter, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await self.effects.done()
        finally:
            # At once, as another may lead by now: no caller may be answered from what this one remembers.
            self._stopped = True
            self.presence.wake_all()
            # What is being applied is finished, so that those who wait for it are answered; not for ever, on a disk
            # that fails.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._applying.acquire(), _STORAGE_RETRY_S)
            for task in [waiter, *tasks]:
                task.cancel()
            await asyncio.gather(waiter, *tasks, return_exceptions=True)
            while not self._inbox.empty():
                _fail(self._inbox.get_nowait()[1], StorageError(STOPPING))
            await self._observers.close()

    async def post(self, decision: Decision | Event) -> None:
        """Applies an event and returns when its effect is durable; raises what the decision raises."""
        if self._stopped:
            raise StorageError(STOPPING)
        decide: Decision = decision if callable(decision) else lambda _: decision
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((decide, future))
        await future

    async def _apply_events(self) -> None:
        while True:
            batch = [await self._inbox.get()]
            try:
                await self._applying.acquire()
            except asyncio.CancelledError:
                _fail(batch[0][1], StorageError(STOPPING))
                raise
            while not self._inbox.empty():
                batch.append(self._inbox.get_nowait())
            instructions: list[Instruction] = []
            applied: list[asyncio.Future[None]] = []
            for decide, future in batch:
                event = None
                try:
                    event = decide(self.state)
                    instructions += self._machine.apply(event) if event else []
                except Exception as error:  # noqa: BLE001 - who asked gets it; the other events of the batch count
                    _fail(future, error)
                    if event is not None and not isinstance(error, FedhdsError):
                        # The site would send the same result again, and end the process again.
                        subject = f"the event {type(event).__name__}"
                        instructions += self._machine.apply(run_failed(subject, error))
                else:
                    applied.append(future)
                    if isinstance(event, SiteConnected):
                        self.presence.note(event.site)
            try:
                instructions += self._machine.advance()
            except Exception as error:  # noqa: BLE001 - it is logged, and ends the run
                instructions += self._machine.apply(run_failed("the run's next step", error))
            try:
                await self._commit(instructions, applied)
            finally:
                # Of a commit that was cut short, nobody else would tell those who wait.
                for future in applied:
                    _fail(future, StorageError(STOPPING))
                self._applying.release()

    async def _commit(self, instructions: list[Instruction], applied: list[asyncio.Future[None]]) -> None:
        records = [instruction for instruction in instructions if isinstance(instruction, Record)]
        entries = [JournalEntry(time.time(), record.message, record.trouble) for record in records]
        self.presence.count_bytes(self.state)
        try:
            await asyncio.to_thread(self._store.save, self.state, entries)
        except StorageError as error:
            logger.error("%s", error)
            # What is not durable has not happened: back to the saved state, and those who asked are told.
            self._machine.state = await self._reloaded()
            for future in applied:
                _fail(future, error)
            return
        self.presence.refresh()
        self.uploads.refresh()
        self._journal_tail.extend(entries)
        self._journal_lines += len(entries)
        for record in records:
            logger.log(logging.WARNING if record.trouble else logging.INFO, "%s", record.message)
        self._observers.committed(self.state, entries)
        for future in applied:
            if not future.done():
                future.set_result(None)
        if any(isinstance(instruction, Wake) for instruction in instructions):
            self.presence.wake()
        self.effects.start([instruction for instruction in instructions if not isinstance(instruction, Record | Wake)])
        self.timers.settle()

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


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
