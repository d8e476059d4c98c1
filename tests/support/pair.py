"""Two coordinators that stand by for each other."""

from __future__ import annotations

import re

import psycopg

from tests.support.federation import Daemon, Federation
from tests.support.postgres import PostgresServer
from tests.support.tiny import write_rows


class Pair:
    """Coordinators that stand by for each other."""

    def __init__(self, federation: Federation, postgres: PostgresServer) -> None:
        self.federation = federation
        self.postgres = postgres
        self.store = postgres.create_database()
        self.artifacts = federation.folder / "artifacts"
        self.artifacts.mkdir()
        # In the environment, where no list of processes shows it.
        federation.environment["FEDHDS_STORE"] = self.store

    def server(self, run: str, *flags: str) -> Daemon:
        folder = self.federation.folder / run
        folder.mkdir(exist_ok=True)
        if not (folder / "artifacts").exists():
            (folder / "artifacts").symlink_to(self.artifacts)
        return self.federation.server(
            "--rounds=6", "--selection-strategy=full", "--min-sites=2", *flags, run=run, may_stand_by=True
        )

    def client(self, name: str) -> Daemon:
        path = write_rows(self.federation.folder / f"{name}.jsonl", {"sun": 10})
        servers = f"{self.federation.address('one')},{self.federation.address('two')}"
        return self.federation.client(name, f"--data={path}", server=servers)

    def journal(self) -> list[str]:
        with psycopg.connect(self.store) as connection:
            return [row[0] for row in connection.execute("select message from journal order by sequence")]


def closed(lines: list[str]) -> list[str]:
    return [found[0] for line in lines if (found := re.match(r"round \d+ closed", line))]


ROUNDS = [f"round {number} closed" for number in range(1, 7)]
