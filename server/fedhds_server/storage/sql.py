"""The store in a SQL database through SQLAlchemy: SQLite in the run folder, or PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from fedhds import __version__
from fedhds.errors import NotLeading, SettingsError, StorageError
from fedhds_server.counters import SAVE_FAILURES, SAVE_SECONDS
from fedhds_server.run.state import RunState
from fedhds_server.storage.base import JournalEntry, Store
from fedhds_server.storage.schema import JOURNAL, LEASE, RUN, is_current, upgrade

# Of the state's JSON; goes up when an older program could not read what a newer one writes.
_FORMAT = 2
# What opens a run of another format.
_VERSIONS = {1: "version 0.2"}
# Any number does: it keeps two coordinators from making the tables of one PostgreSQL database at the same time.
_UPGRADING = 5_163_470
# A database whose host is gone without a word is noticed within about 5 s, as long as a lease lasts.
_LIBPQ = {
    "application_name": "fedhds-server",
    "connect_timeout": "5",
    "keepalives_idle": "2",
    "keepalives_interval": "1",
    "keepalives_count": "3",
    "tcp_user_timeout": "5000",
}


class SqlStore(Store):
    """One run per database; in PostgreSQL, one per schema (the first of the connection's search_path)."""

    def __init__(self, url: sa.URL) -> None:
        # Without the user and the options, which may hold a password as well.
        public = sa.URL.create(url.get_backend_name(), host=url.host, port=url.port, database=url.database)
        self._place = public.render_as_string()
        self._shared = url.get_backend_name() == "postgresql"
        self._token: int | None = None
        self._lease_s = 0.0
        if self._shared:
            # Pinged before use: a server that was started again costs no save.
            self._engine = sa.create_engine(url, pool_pre_ping=True)
            self._clock: sa.ColumnElement[float] = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Float)
            sa.event.listen(self._engine, "connect", _prepare_postgresql)
        else:
            self._engine = sa.create_engine(url)
            self._clock = sa.literal(0.0)
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        with ExitStack() as unless_opened:
            unless_opened.callback(self.close)
            with self._transaction() as connection:
                if self._shared:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADING)))
                if sa.inspect(connection).has_table(RUN.name):
                    # Before any table changes: the version that wrote the run must be able to finish it.
                    self._run(connection)
                upgrade(connection)
            unless_opened.pop_all()

    @classmethod
    def in_folder(cls, folder: Path) -> SqlStore:
        """The SQLite store of a run folder, whose lock keeps a second coordinator away: the lease is always granted."""
        return cls(sa.URL.create("sqlite", database=str(folder / "run.db")))

    @classmethod
    def at(cls, url: str) -> SqlStore:
        """The store in the PostgreSQL database at `url`; raises SettingsError, which does not repeat the URL."""
        return cls(_postgresql(url))

    def load(self) -> RunState | None:
        with self._transaction() as connection:
            content = self._run(connection)
        if content is None:
            return None
        try:
            return RunState.model_validate_json(content)
        except ValidationError as error:
            raise StorageError(
                f"the run's state cannot be read: {error.errors()[0]['msg']}; restore a backup"
            ) from error

    @SAVE_FAILURES.count_exceptions(StorageError)
    @SAVE_SECONDS.time()
    def save(self, state: RunState, entries: Sequence[JournalEntry] = ()) -> None:
        values = {"id": 1, "format": _FORMAT, "state": state.model_dump_json()}
        with self._transaction() as connection:
            # First, as it locks the lease: another coordinator waits until this is saved.
            self._hold(connection)
            if not connection.execute(sa.update(RUN).where(RUN.c.id == 1).values(values)).rowcount:
                connection.execute(sa.insert(RUN).values(values))
            if entries:
                # PostgreSQL's text has no NUL, which a site's message may have.
                rows = [
                    {"at": entry.at, "message": entry.message.replace("\0", "\ufffd"), "trouble": entry.trouble}
                    for entry in entries
                ]
                connection.execute(sa.insert(JOURNAL), rows)

    def journal(self) -> list[JournalEntry]:
        with self._transaction() as connection:
            rows = connection.execute(sa.select(JOURNAL).order_by(JOURNAL.c.sequence))
            return [JournalEntry(row.at, row.message, row.trouble) for row in rows]

    def up_to_date(self) -> bool:
        with self._transaction() as connection:
            return is_current(connection)

    def acquire(self, holder: str, address: str, lease_s: float) -> bool:
        free = sa.or_(LEASE.c.holder == holder, LEASE.c.expires_at <= self._clock)
        taken = (
            sa.update(LEASE)
            .where(free if self._shared else sa.true())
            .values(token=LEASE.c.token + 1, holder=holder, address=address, expires_at=self._clock + lease_s)
            .returning(LEASE.c.token)
        )
        with self._transaction() as connection:
            token = connection.execute(taken).scalar_one_or_none()
        self._token, self._lease_s = token, lease_s
        return token is not None

    def renew(self) -> None:
        # A run folder's lock does not run out; a write per second would only keep its disk awake.
        if self._shared:
            with self._transaction() as connection:
                self._hold(connection)

    def release(self) -> None:
        if self._token is None:
            return
        ended = sa.update(LEASE).where(LEASE.c.token == self._token).values(holder="", address="", expires_at=0.0)
        with self._transaction() as connection:
            connection.execute(ended)
        self._token = None

    def leader(self) -> str:
        with self._transaction() as connection:
            return self._leader(connection)

    def close(self) -> None:
        self._engine.dispose()

    def _run(self, connection: sa.Connection) -> str | None:
        """The run's state as JSON, None without a run; raises StorageError for a run of another format."""
        row = connection.execute(sa.select(RUN.c.format, RUN.c.state)).one_or_none()
        if row is None:
            return None
        if row.format != _FORMAT:
            wrote = _VERSIONS.get(row.format, "a newer version")
            raise StorageError(
                f"the run in {self._place} has format {row.format}, which {wrote} of fedhds wrote; this is fedhds "
                f"{__version__}, which reads format {_FORMAT}; finish it with {wrote}, or start a new run elsewhere"
            )
        return str(row.state)

    def _hold(self, connection: sa.Connection) -> None:
        renewal = sa.update(LEASE).where(LEASE.c.token == self._token).values(expires_at=self._clock + self._lease_s)
        if not connection.execute(renewal).rowcount:
            leader = self._leader(connection) or "nobody"
            raise NotLeading(f"this coordinator does not lead the run (any more), {leader} does")

    def _leader(self, connection: sa.Connection) -> str:
        valid = LEASE.c.expires_at > self._clock
        return connection.execute(sa.select(LEASE.c.address).where(valid)).scalar_one_or_none() or ""

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            if self._shared:
                advice = "check that the server runs and lets this user read and write"
            elif type(error) is sa.exc.DatabaseError:
                # SQLite's for a file that is damaged, or none of its own.
                advice = "restore a backup"
            else:
                advice = "check that the disk is neither full nor read-only and that no other program locks the file"
            raise StorageError(f"cannot use the state database {self._place}: {reason}; {advice}") from error


def _postgresql(text: str) -> sa.URL:
    scheme, _, rest = text.partition("://")
    try:
        url = sa.make_url(f"postgresql+psycopg://{rest}")
    except (sa.exc.ArgumentError, ValueError):
        # Not its cause either: it may quote the password.
        raise SettingsError("--store", _MALFORMED) from None
    # A password with a bare @ would end up in the host's name, and so in messages.
    if scheme not in ("postgresql", "postgres") or "@" in (url.host or ""):
        raise SettingsError("--store", _MALFORMED)
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "--store", f"PostgreSQL needs its driver ({error}); install it: pip install 'fedhds[postgres]'"
        ) from error
    return url.set(query=_LIBPQ | dict(url.query))


_MALFORMED = (
    "is not of the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE; write special characters of the password as "
    "%XX, or leave it to ~/.pgpass"
)


def _prepare_sqlite(connection: Any, _: object) -> None:
    # Python's driver opens transactions by itself, but not before DDL: a migration would not be one step.
    connection.isolation_level = None
    cursor = connection.cursor()
    # FULL, since in WAL mode NORMAL may lose the last transactions in a power cut: an accepted update would be gone.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _prepare_postgresql(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # A leader that stands still, or is cut off, in mid-save must not keep the lease's row locked.
    cursor.execute("SET idle_in_transaction_session_timeout = '5s'")
    cursor.execute("SET lock_timeout = '10s'")
    # A database or a role may have it off, which loses what was acknowledged; what is stricter stays.
    cursor.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    cursor.close()
    connection.commit()
