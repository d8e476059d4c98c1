"""A site's ledger: what it has released, durable before it is sent, so that nothing is spent unseen or twice.

The file holds one JSON object a line and only grows. Next to it a folder holds the released bytes, so that a retry,
also after a restart, sends the same noise: two draws of one release would cost twice.
"""

from __future__ import annotations

import hashlib
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedhds.errors import PrivacyError, StorageError
from fedhds.privacy.mechanisms import composed_multiplier, gaussian_epsilon
from fedhds.runtime.files import replace_file, sync

Unit = Literal["client", "example"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Entry(BaseModel):
    """One release of this site. Entries of one unit and adjacency compose; others must never be added to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: str = Field(default_factory=_now, description="When it was recorded: UTC, ISO 8601.")
    run_id: str = Field(description="The run it was released in.")
    task_id: str = Field(description="The task it answered; unique only within the run.")
    release: str = Field(default="centroids", description="What was released.")
    mechanism: Literal["gaussian", "none"] = Field(description="How it was protected.")
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False, description="Noise deviation over sensitivity; 0: none.")
    sensitivity: float | None = Field(allow_inf_nan=False, description="L2 sensitivity; null: unbounded, not clipped.")
    clip_norm: float = Field(
        ge=0, allow_inf_nan=False, description="Norm every centroid or row was clipped to; 0: none."
    )
    released: int = Field(ge=0, description="Number of centroids or clusters.")
    dimension: int = Field(ge=0, description="Values per centroid.")
    delta: float = Field(gt=0, lt=1, description="Delta at which `epsilon` holds.")
    unit: Unit = Field(
        default="client",
        description="Privacy unit: the whole shard, replaced (client), or one row, left out (example).",
    )
    epsilon: float | None = Field(description="Epsilon of this release alone; null: without any guarantee.")
    digest: str = Field(description="SHA-256 of the released bytes.")


class Ledger:
    """The append-only ledger of one site at `path`, read again for every answer, so that it never answers stale.

    One process writes it at a time: the one that has the lock of the site's state folder. Methods raise StorageError
    when the file or a payload cannot be read or written or is damaged. A last line without its line feed is what a
    crash leaves of an append that had not returned; nothing was sent for it, so it does not count.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._payloads = path.with_suffix(".releases")
        self._read()

    def entries(self) -> list[Entry]:
        """All releases, oldest first."""
        return self._read()[0]

    def size(self) -> int:
        """Bytes in the file; another number as soon as there is another entry."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise StorageError(f"cannot read the ledger {self._path}: {error.strerror}; {_ADVICE}") from error

    def release(self, run_id: str, task_id: str) -> bytes | None:
        """The bytes that were released for this task; None when there was no release for it."""
        entry = self._find(run_id, task_id)
        if entry is None:
            return None
        file = self._payload_file(run_id, task_id)
        try:
            payload = file.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read the recorded release {file}: {error.strerror}; {_ADVICE}") from error
        if hashlib.sha256(payload).hexdigest() != entry.digest:
            raise StorageError(f"the recorded release {file} is damaged; {_ADVICE}")
        return payload

    def record(
        self,
        payload: bytes,
        *,
        run_id: str,
        task_id: str,
        noise_multiplier: float,
        sensitivity: float | None,
        clip_norm: float,
        released: int,
        dimension: int,
        delta: float,
        release: str = "centroids",
        unit: Unit = "client",
    ) -> Entry:
        """Makes a release and its entry durable; only then may `payload` be sent.

        `unit` and adjacency are those of `sensitivity`, in L2; None, with `noise_multiplier` 0, for a release that is
        not bounded. Raises PrivacyError when the task has released before: send what `release` gives.
        """
        if self._find(run_id, task_id):
            raise PrivacyError(f"task {task_id} of run {run_id} has released before; a second draw would cost twice")
        epsilon = gaussian_epsilon(noise_multiplier=noise_multiplier, delta=delta)
        entry = Entry(
            run_id=run_id,
            task_id=task_id,
            mechanism="gaussian" if noise_multiplier else "none",
            noise_multiplier=noise_multiplier,
            sensitivity=sensitivity,
            clip_norm=clip_norm,
            released=released,
            dimension=dimension,
            delta=delta,
            release=release,
            unit=unit,
            epsilon=epsilon if math.isfinite(epsilon) else None,
            digest=hashlib.sha256(payload).hexdigest(),
        )
        replace_file(self._payload_file(run_id, task_id), payload, private=True)
        try:
            self._append(entry.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise StorageError(f"cannot write to the ledger {self._path}: {error.strerror}; make room there") from error
        return entry

    def spent(self, run_id: str | None = None, *, delta: float, unit: Unit = "client") -> float:
        """Epsilon at `delta` of the releases of `unit` (of one run, or of all); inf if any release had no noise."""
        multipliers = self._multipliers(unit, run_id)
        return gaussian_epsilon(noise_multiplier=composed_multiplier(multipliers), delta=delta)

    def check(self, *, max_epsilon: float | None, noise_multiplier: float, delta: float, unit: Unit = "client") -> None:
        """Raises PrivacyError if one more release would take the site past `max_epsilon` (None: no limit).

        Counts every release of `unit` ever recorded, of any run, and all that had no noise; sound only for a `delta`
        of the site's own choosing, as a large one makes any epsilon small.
        """
        if max_epsilon is None:
            return
        multipliers = self._multipliers(unit)
        after = gaussian_epsilon(noise_multiplier=composed_multiplier([*multipliers, noise_multiplier]), delta=delta)
        if after > max_epsilon:
            raise PrivacyError(
                f"this release would bring the site's {unit}-level epsilon to {after:.4g} (delta {delta:g}; inf: some "
                f"release has no noise), above its own limit of {max_epsilon:g}; the run needs more noise, or the site "
                "a larger --selection-max-epsilon",
                public="this release would go beyond the site's own --selection-max-epsilon",
            )

    def _multipliers(self, unit: Unit, run_id: str | None = None) -> list[float]:
        """Units never mix, but what was released without noise is without any guarantee for all of them."""
        return [
            entry.noise_multiplier
            for entry in self.entries()
            if run_id in (None, entry.run_id) and (entry.unit == unit or not entry.noise_multiplier)
        ]

    def _find(self, run_id: str, task_id: str) -> Entry | None:
        return next((e for e in self.entries() if (e.run_id, e.task_id) == (run_id, task_id)), None)

    def _payload_file(self, run_id: str, task_id: str) -> Path:
        # Task ids hold slashes and come from the coordinator; no part of one may become a path.
        return self._payloads / hashlib.sha256(f"{run_id}\n{task_id}".encode()).hexdigest()[:24]

    def _read(self) -> tuple[list[Entry], int]:
        """All entries and the length in bytes that they fill."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise StorageError(f"cannot read the ledger {self._path}: {error.strerror}; {_ADVICE}") from error
        *lines, torn = content.split(b"\n")
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entries.append(Entry.model_validate_json(line))
            except ValidationError as error:
                raise StorageError(f"line {number} of the ledger {self._path} is damaged; {_ADVICE}") from error
        return entries, len(content) - len(torn)

    def _append(self, line: bytes) -> None:
        """Cuts off a torn tail and appends `line`, whole or not at all."""
        _, size = self._read()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, size)
            try:
                written = 0
                while written < len(line):
                    written += os.pwrite(descriptor, line[written:], size + written)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        sync(self._path.parent)


_ADVICE = (
    "what this site has spent cannot be told without it: restore the file from a backup, or move the site's state "
    "folder away and count its budget as spent"
)
