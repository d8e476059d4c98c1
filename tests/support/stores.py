"""Databases of every kind that the store's tests open, again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from fedhds.spec import RunSpec
from fedhds_server.run.state import RunState
from fedhds_server.storage.sql import SqlStore
from tests.support.postgres import PostgresServer


class Place:
    """A database that stores are opened on, again and again."""

    def __init__(self, argument: str, opener: Callable[[], SqlStore], engine: sa.Engine) -> None:
        self.argument = argument
        self._opener = opener
        self.engine = engine
        self.stores: list[SqlStore] = []

    def open(self) -> SqlStore:
        self.stores.append(self._opener())
        return self.stores[-1]

    def leading(self, holder: str = "h", lease_s: float = 60.0) -> SqlStore:
        """A store that holds the lease."""
        store = self.open()
        assert store.acquire(holder, f"{holder}:1", lease_s)
        return store

    def execute(self, statement: str) -> None:
        """What somebody else does to the database."""
        with self.engine.begin() as connection:
            connection.exec_driver_sql(statement)

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.engine.dispose()


def sqlite_place(folder: Path) -> Place:
    engine = sa.create_engine(f"sqlite:///{folder / 'run.db'}")
    return Place(str(folder), lambda: SqlStore.in_folder(folder), engine)


def postgres_place(postgres: PostgresServer) -> Place:
    url = postgres.create_database()
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), pool_pre_ping=True)
    return Place(url, lambda: SqlStore.at(url), engine)


def state(round_number: int = 0) -> RunState:
    return RunState(run_id="r", spec=RunSpec.of(model="m", rounds=3), round_number=round_number)
