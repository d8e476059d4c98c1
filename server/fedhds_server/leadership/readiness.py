"""Whether this process could do a coordinator's work: its database, the database's tables, its disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fedhds.errors import StorageError
from fedhds_server.leadership.gate import LeaderGate
from fedhds_server.optimizers import OPTIMIZERS
from fedhds_server.run.quorum import CohortProgress
from fedhds_server.run.state import RunState
from fedhds_server.storage.base import Store

_CHECK_S = 1.0
# Beyond it, an answer of the store or the disk counts as one that does not come.
_ANSWER_S = 5.0
# For the state database, its log, the checkpoint's small files and what else writes there until somebody looks.
DISK_RESERVE = 16 << 20


def disk_needed(state: RunState | None) -> int:
    """Bytes that one round may write, and a reserve.

    An adapter for each update that the open round still lacks, the new global adapter, its copies in the checkpoints
    (of the last round, and of the best one), and the server optimizer's new slots.
    """
    if state is None or not state.adapters:
        return DISK_RESERVE
    # Slots are float32, whatever the adapters' type.
    adapter = max(artifact.size for artifact in (*state.adapters.values(), *state.slots.values()))
    slots = len(OPTIMIZERS[state.spec.aggregation.optimizer.name].slots)
    stage = state.stage
    missing = max(len(stage.cohort), stage.target) - len(stage.uploads) if stage else 0
    copies = 2 if state.best_round is None else 3
    return DISK_RESERVE + (max(missing, 0) + copies + slots) * adapter


@dataclass
class Readiness:
    """Looks every second, tells `gate` of problems, and remembers since when the run has not moved."""

    store: Store
    folder: Path
    gate: LeaderGate
    disk_free: float = float("nan")
    """Bytes that this user may still write where it is tightest; nan before the first look."""
    _progress: object = None
    _progressed_at: float = field(default_factory=time.monotonic)
    _short_since: float | None = None

    @property
    def state(self) -> RunState | None:
        """The run; None while this process does not lead."""
        return self.gate.coordinator.state if self.gate.coordinator else None

    @property
    def idle_s(self) -> float:
        """Seconds since the run last moved: another phase, stage or round, an answer, an evaluation."""
        return time.monotonic() - self._progressed_at

    @property
    def short_s(self) -> float:
        """Seconds for which the open stage has been short of its quorum with nobody at work on it."""
        return time.monotonic() - self._short_since if self._short_since is not None else 0.0

    async def watch(self) -> None:
        """Runs until cancelled."""
        # A thread of its own, that a disk or a database that does not answer may keep.
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="readiness")
        try:
            while True:
                self._look()
                looking = asyncio.get_running_loop().run_in_executor(thread, self._problems, *self._disk())
                done, _ = await asyncio.wait([looking], timeout=_ANSWER_S)
                if not done:
                    await self.gate.set_problems(
                        {"store": f"the store or the disk has not answered for {_ANSWER_S:g} s"}
                    )
                await self.gate.set_problems(await looking)
                await asyncio.sleep(_CHECK_S)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> None:
        state = self.state
        cohort = CohortProgress.of(state) if state else None
        if state:
            stage = state.stage
            answers = (stage.name, stage.closed, len(stage.replies)) if stage else ()
            evaluations = sum(map(len, [*state.evaluations.values(), *state.validations.values()]))
            progress = (state.phase, answers, evaluations, len(state.sites))
            if progress != self._progress:
                self._progress, self._progressed_at = progress, time.monotonic()
        if not state or not cohort or not cohort.short or state.paused is not None:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = time.monotonic()

    def _disk(self) -> tuple[list[Path], int]:
        """Folders that are written to, and the room that each is to have."""
        artifacts = [self.gate.coordinator.artifacts.folder] if self.gate.coordinator else []
        return [self.folder, *artifacts], disk_needed(self.state)

    def _problems(self, folders: list[Path], needed: int) -> Mapping[str, str]:
        """What is wrong, by kind; in the thread, which does not touch the run's state."""
        problems = {}
        try:
            if not self.store.up_to_date():
                problems["migrations"] = (
                    "the state database has other tables than this program's; start the new version"
                )
        except StorageError as error:
            problems["store"] = str(error)
        try:
            free = {folder: shutil.disk_usage(folder).free for folder in folders}
            self.disk_free = min(free.values())
            if self.disk_free < needed:
                tightest = min(free, key=free.__getitem__)
                problems["disk"] = (
                    f"{tightest} has {_mib(self.disk_free)} MiB left, a round may need {_mib(needed)}; make room"
                )
            for folder in folders:
                if os.statvfs(folder).f_flag & os.ST_RDONLY:
                    problems["disk"] = f"the file system of {folder} is read-only; mount it writable"
        except OSError as error:
            problems["disk"] = f"{error.filename}: {error.strerror}"
        return problems


def _mib(size: float) -> int:
    return int(size) >> 20
