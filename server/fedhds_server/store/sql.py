"""The store in a SQL database through SQLAlchemy; SQLite in the run folder by default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from fedhds.errors import StorageError
from fedhds_server.state import RunState
from fedhds_server.store.base import JournalEntry, Store

_metadata = sa.MetaData()
_run = sa.Table(
    "run",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("format", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
)
_journal = sa.Table(
    "journal",
    _metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("trouble", sa.Boolean, nullable=False),
)
# Of the state's JSON; goes up when an older program could not read what a newer one writes.
_FORMAT = 1


class SqlStore(Store):
    """One run per database."""

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _durable)
        with self._guarded(), self._engine.begin() as connection:
            _metadata.create_all(connection)

    @classmethod
    def in_folder(cls, folder: Path) -> SqlStore:
        """The SQLite store of a run folder."""
        return cls(f"sqlite:///{folder / 'run.db'}")

    def load(self) -> RunState | None:
        with self._guarded(), self._engine.connect() as connection:
            row = connection.execute(sa.select(_run.c.format, _run.c.state)).one_or_none()
        if row is None:
            return None
        if row.format != _FORMAT:
            raise StorageError(
                f"the run's state has format {row.format}, this program reads {_FORMAT}; use the version that wrote it"
            )
        try:
            return RunState.model_validate_json(row.state)
        except ValidationError as error:
            raise StorageError(
                f"the run's state cannot be read: {error.errors()[0]['msg']}; restore a backup"
            ) from error

    def save(self, state: RunState, entries: Sequence[JournalEntry] = ()) -> None:
        values = {"id": 1, "format": _FORMAT, "state": state.model_dump_json()}
        with self._guarded(), self._engine.begin() as connection:
            if not connection.execute(sa.update(_run).where(_run.c.id == 1).values(values)).rowcount:
                connection.execute(sa.insert(_run).values(values))
            if entries:
                rows = [{"at": entry.at, "message": entry.message, "trouble": entry.trouble} for entry in entries]
                connection.execute(sa.insert(_journal), rows)

    def journal(self) -> list[JournalEntry]:
        with self._guarded(), self._engine.connect() as connection:
            rows = connection.execute(sa.select(_journal).order_by(_journal.c.sequence))
            return [JournalEntry(row.at, row.message, row.trouble) for row in rows]

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error)
            raise StorageError(
                f"cannot use the state database {self._engine.url.render_as_string()}: {reason}; check that the "
                "disk is neither full nor read-only"
            ) from error


def _durable(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # FULL, since in WAL mode NORMAL may lose the last transactions in a power cut: an accepted update would be gone.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
