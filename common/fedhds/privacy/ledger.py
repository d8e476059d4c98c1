"""What the sites of this host have released about which rows: durable before it is sent, never counted too low.

The ledger belongs to the user who runs the sites, not to a run, a name or a file: it knows rows by the digest of their
content. Rows that were always released together are one class, so that a release costs as many entries as there are
classes among its rows, mostly one. Everything is in one SQLite file; several processes may use it at a time.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedhds.errors import PrivacyError, StorageError
from fedhds.privacy.accountant import Cost, epsilon_of
from fedhds.privacy.ledger_rows import SCHEMA, SCHEMA_VERSION, register
from fedhds.runtime.files import make_folder, sync

Unit = Literal["client", "example"]

# Another process that uses the file is done in milliseconds, but for a large shard that it meets for the first time.
_LOCK_TIMEOUT_S = 120.0
# The bytes of older runs' releases go: nobody asks for them again, and if somebody does, there is no second draw.
_RUNS_WITH_PAYLOADS = 16


class Entry(BaseModel):
    """One release. Entries of one unit and adjacency compose; others must never be added to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: str = Field(description="When it was recorded: UTC, ISO 8601.")
    run_id: str = Field(description="The run it was released in.")
    task_id: str = Field(description="The task it answered; unique only within the run.")
    release: str = Field(description="What was released.")
    unit: Unit = Field(description="Privacy unit: the whole shard, replaced (client), or one row, left out (example).")
    noise_multiplier: float = Field(description="Noise deviation over sensitivity; 0: none.")
    sample_rate: float = Field(description="Share of the rows in each step's Poisson sample; 1: no sampling.")
    steps: int = Field(description="Noised steps of the release.")
    replaced: bool = Field(description="Whether another row takes the place of the one that is left out.")
    sensitivity: float | None = Field(description="L2 sensitivity; null: unbounded, not clipped.")
    clip_norm: float = Field(description="Norm that every centroid, row or gradient was clipped to; 0: none.")
    released: int = Field(description="Number of centroids, clusters or tensors.")
    dimension: int = Field(description="Values per centroid; 0: does not apply.")
    delta: float = Field(description="Delta at which `epsilon` holds.")
    epsilon: float | None = Field(description="Epsilon of this release alone; null: without any guarantee.")
    digest: str = Field(description="SHA-256 of the released bytes; empty for an adapter, which the site keeps.")
    rows: int = Field(description="Rows of the shard that the release is about.")

    @property
    def cost(self) -> Cost:
        """What the release costs."""
        return Cost(self.noise_multiplier, self.sample_rate, self.steps, self.replaced)


@dataclass(frozen=True)
class Limit:
    """A bound that the site sets on what its releases may cost."""

    epsilon: float
    delta: float
    rule: str
    """The flag or line of the policy that sets it."""
    run_id: str = ""
    """Of this run's releases alone; empty: of all, ever."""
    selection_only: bool = False
    """Not of adapters."""


class Ledger:
    """The ledger at `path`, read again for every answer, so that it never answers stale.

    Methods raise StorageError when the file cannot be read or written or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def account(self, key: Callable[[], str] | str, digests: Callable[[], Iterable[bytes]]) -> Account:
        """The view of one shard: `digests` gives its rows' digests, `key` a digest of them all."""
        return Account(self, key if callable(key) else lambda: key, digests)

    def entries(self) -> list[Entry]:
        """All releases about any rows, oldest first."""
        with self.opened() as db:
            return [] if db is None else [entry for _, entry in _entries(db, "SELECT id FROM releases", [])]

    def row_sets(self) -> list[tuple[str, int, list[Entry]]]:
        """Every shard that was released from: the digest of its rows, how many they are, what was released of any."""
        with self.opened() as db:
            if db is None:
                return []
            sets = db.execute("SELECT id, key, rows FROM sets ORDER BY id").fetchall()
            return [(key, rows, [entry for _, entry in _entries(db, _OF_SET, [number])]) for number, key, rows in sets]

    @contextmanager
    def opened(self, *, write: bool = False) -> Iterator[sqlite3.Connection | None]:
        """A transaction on the file; None where there is none yet and nothing is to be written."""
        if not write and not self.path.exists():
            yield None
            return
        try:
            if write and not self.path.exists():
                make_folder(self.path.parent, private=True)
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
                sync(self.path.parent)
            if write:
                self.path.chmod(0o600)
            with closing(sqlite3.connect(self.path, timeout=_LOCK_TIMEOUT_S, isolation_level=None)) as db:
                # The journal is synced, and so is its removal, before a commit returns.
                db.execute("PRAGMA synchronous = EXTRA")
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if not version and write:
                    for statement in SCHEMA:
                        db.execute(statement)
                elif version != SCHEMA_VERSION:
                    if not version and not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                        yield None
                        return
                    raise StorageError(f"the ledger {self.path} is of another version of fedhds; use that version")
                try:
                    yield db
                except BaseException:
                    db.rollback()
                    raise
                db.commit()
        except (sqlite3.Error, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise StorageError(f"cannot use the ledger {self.path}: {reason}; {_ADVICE}") from error


class Account:
    """What the ledger has of one shard's rows: in the unit example of the row that lost most, in client of them all."""

    def __init__(self, ledger: Ledger, key: Callable[[], str], digests: Callable[[], Iterable[bytes]]) -> None:
        self.ledger = ledger
        self._key, self._digests = key, digests

    def entries(self) -> list[Entry]:
        """All releases about any of these rows, oldest first."""
        with self._read() as (db, number):
            return [] if db is None else [entry for _, entry in _entries(db, _OF_SET, [number])]

    def size(self) -> int:
        """Another number as soon as there is another release about any rows."""
        with self.ledger.opened() as db:
            return 0 if db is None else db.execute("SELECT COALESCE(MAX(id), 0) FROM releases").fetchone()[0]

    def release(self, run_id: str, task_id: str) -> bytes | None:
        """The bytes that were released for this task; None when there was no release for it.

        Raises PrivacyError when they are gone: a second draw would cost twice.
        """
        with self.ledger.opened() as db:
            query = "SELECT payload, digest FROM releases WHERE run_id = ? AND task_id = ? ORDER BY id DESC"
            row = None if db is None else db.execute(query, [run_id, task_id]).fetchone()
        if row is None:
            return None
        payload, digest = row
        if payload is None:
            raise PrivacyError(f"task {task_id} of run {run_id} has released before, and its bytes are gone")
        if hashlib.sha256(payload).hexdigest() != digest:
            raise StorageError(f"the release of task {task_id} in the ledger {self.ledger.path} is damaged; {_ADVICE}")
        return bytes(payload)

    def spent(self, run_id: str | None = None, *, delta: float, unit: Unit = "client") -> float:
        """Epsilon at `delta` of the releases of `unit` (of one run, or of all); inf if any release had no noise."""
        with self._read() as (db, number):
            return 0.0 if db is None else _spent(db, number, unit, delta=delta, run_id=run_id)

    def costs(self, run_id: str, *, unit: Unit) -> list[Cost]:
        """What this run's releases of `unit` about any of these rows cost, oldest first."""
        return [entry.cost for entry in self.entries() if entry.run_id == run_id and entry.unit == unit]

    def check(self, cost: Cost, *, unit: Unit, limits: Sequence[Limit], adapter: bool = False) -> None:
        """Raises PrivacyError if one more release of that cost would go beyond one of `limits`.

        What had no noise counts in every unit. Sound only for deltas of the site's own choosing, as a large one makes
        any epsilon small.
        """
        if not limits:
            return
        with self.ledger.opened(write=True) as db:
            assert db is not None
            _check(db, register(db, self._key(), self._digests()), cost, unit, limits, adapter)

    def record(
        self,
        payload: bytes | None,
        *,
        run_id: str,
        task_id: str,
        cost: Cost,
        sensitivity: float | None,
        clip_norm: float,
        released: int,
        dimension: int,
        delta: float,
        release: str = "centroids",
        unit: Unit = "client",
        limits: Sequence[Limit] = (),
    ) -> Entry:
        """Makes a release and its entry durable; only then may `payload` be sent.

        `unit` and adjacency are those of `sensitivity`, in L2; None, with a cost without noise, for a release that is
        not bounded. `payload` is None for an adapter, which may be recorded again: it was trained again then, with new
        noise. Raises PrivacyError when a limit forbids it, or the task has released before: send what `release` gives.
        """
        epsilon = epsilon_of([cost], delta=delta)
        entry = Entry(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            run_id=run_id,
            task_id=task_id,
            release=release,
            unit=unit,
            noise_multiplier=cost.noise_multiplier,
            sample_rate=cost.sample_rate,
            steps=cost.steps,
            replaced=cost.replaced,
            sensitivity=sensitivity,
            clip_norm=clip_norm,
            released=released,
            dimension=dimension,
            delta=delta,
            epsilon=epsilon if math.isfinite(epsilon) else None,
            digest="" if payload is None else hashlib.sha256(payload).hexdigest(),
            rows=0,
        )
        with self.ledger.opened(write=True) as db:
            assert db is not None
            if payload is not None and db.execute(_FIND, [run_id, task_id]).fetchone():
                raise PrivacyError(
                    f"task {task_id} of run {run_id} has released before; a second draw would cost twice"
                )
            number = register(db, self._key(), self._digests())
            _check(db, number, cost, unit, limits, adapter=payload is None)
            values = [getattr(entry, name) for name in _COLUMNS]
            marks = ", ".join("?" * (len(_COLUMNS) + 2))
            db.execute(
                f"INSERT INTO releases ({', '.join(_COLUMNS)}, payload, set_id) VALUES ({marks})",
                [*values, payload, number],
            )
            db.execute(
                "INSERT INTO spends SELECT class, last_insert_rowid() FROM set_classes WHERE set_id = ?", [number]
            )
            db.execute(_FORGET, [_RUNS_WITH_PAYLOADS])
            rows = db.execute("SELECT rows FROM sets WHERE id = ?", [number]).fetchone()[0]
        return entry.model_copy(update={"rows": rows})

    @contextmanager
    def _read(self) -> Iterator[tuple[sqlite3.Connection | None, int]]:
        """The ledger with the number of this shard's set; new rows may be part of others."""
        with self.ledger.opened() as db:
            row = db and db.execute("SELECT id FROM sets WHERE key = ?", [self._key()]).fetchone()
            if db is None or row:
                yield db, row[0] if row else 0
                return
        with self.ledger.opened(write=True) as db:
            assert db is not None
            yield db, register(db, self._key(), self._digests())


_COLUMNS = tuple(name for name in Entry.model_fields if name != "rows")
_FIND = "SELECT id FROM releases WHERE run_id = ? AND task_id = ?"
_FORGET = """
    UPDATE releases SET payload = NULL WHERE payload IS NOT NULL AND run_id NOT IN
    (SELECT run_id FROM releases GROUP BY run_id ORDER BY MAX(id) DESC LIMIT ?)
"""
_OF_SET = "SELECT release FROM spends JOIN set_classes USING (class) WHERE set_id = ?"


def _entries(db: sqlite3.Connection, which: str, values: Sequence[object]) -> list[tuple[int, Entry]]:
    """The releases whose ids the query `which` gives, with their ids, oldest first."""
    columns = ", ".join(f"releases.{name}" for name in _COLUMNS)
    rows = db.execute(
        f"SELECT releases.id, {columns}, sets.rows FROM releases JOIN sets ON sets.id = set_id "
        f"WHERE releases.id IN ({which}) ORDER BY releases.id",
        values,
    )
    return [(row[0], Entry(**dict(zip((*_COLUMNS, "rows"), row[1:], strict=True)))) for row in rows]


def _spent(
    db: sqlite3.Connection,
    number: int,
    unit: Unit,
    *,
    delta: float,
    run_id: str | None = None,
    selection_only: bool = False,
    more: Cost | None = None,
) -> float:
    """Epsilon of what was released about the rows of a set, with `more` on top."""
    costs = {
        release: entry.cost
        for release, entry in _entries(db, _OF_SET, [number])
        if run_id in (None, entry.run_id)
        # Units never mix, but what was released without noise is without any guarantee for all of them.
        and (entry.unit == unit or not entry.noise_multiplier)
        and (entry.digest or not selection_only)
    }
    groups: Iterable[tuple[int, ...]]
    if unit == "client":
        groups = [tuple(costs)]
    else:
        by_class: dict[int, list[int]] = {}
        query = "SELECT class, release FROM set_classes JOIN spends USING (class) WHERE set_id = ? ORDER BY release"
        for row_class, release in db.execute(query, [number]):
            if release in costs:
                by_class.setdefault(row_class, []).append(release)
        # Many classes have lost the same.
        groups = {tuple(releases) for releases in by_class.values()} or {()}
    extra = () if more is None else (more,)
    return max(epsilon_of([*(costs[release] for release in group), *extra], delta=delta) for group in groups)


def _check(db: sqlite3.Connection, number: int, cost: Cost, unit: Unit, limits: Sequence[Limit], adapter: bool) -> None:
    for limit in limits:
        if adapter and limit.selection_only:
            continue
        after = _spent(
            db,
            number,
            unit,
            delta=limit.delta,
            run_id=limit.run_id or None,
            selection_only=limit.selection_only,
            more=cost,
        )
        # What was calibrated to the limit may be above it by the rounding of doubles.
        if after > limit.epsilon * (1 + 1e-9):
            whose = "run's" if limit.run_id else "site's"
            raise PrivacyError(
                f"this release would bring the {whose} {unit}-level epsilon to {after:.4g} (delta {limit.delta:g}; "
                f"inf: some release has no noise), above the site's own limit of {limit.epsilon:g}; the run needs more "
                f"noise, or the site a larger {limit.rule}",
                public=f"this release would go beyond the site's own {limit.rule}",
            )


_ADVICE = (
    "what this site has spent cannot be told without it: restore the file from a backup, or give another with --ledger "
    "and count the site's budget as spent"
)
