"""A real PostgreSQL server for the tests, from the system's package, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

# PostgreSQL refuses to run as root; Debian's package makes this user.
_USER = "postgres" if os.geteuid() == 0 else None
PASSWORD = "s3cret/@word"


def _program(name: str) -> str:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(versions[-1]) if versions else shutil.which(name)
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return found


class PostgresServer:
    """A server on a loopback port, whose databases survive `stop` and `start`."""

    def __init__(self) -> None:
        initdb, self._postgres = _program("initdb"), _program("postgres")
        self._folder = Path(tempfile.mkdtemp(prefix="fedhds-postgres-"))
        password = self._folder / "password"
        password.write_text(PASSWORD)
        if _USER:
            for path in (self._folder, password):
                shutil.chown(path, _USER, _USER)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        flags = ("--username=fedhds", f"--pwfile={password}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C")
        self._run([initdb, "--pgdata", str(self._data), *flags, "--no-sync"]).wait()
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self.start()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        """Starts the server and returns when it answers."""
        settings = (f"port={self.port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={self._folder}")
        flags = [word for setting in settings for word in ("-c", setting)]
        self._process = self._run([self._postgres, "-D", str(self._data), *flags])
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self._folder / "log").read_text()) from None
                time.sleep(0.05)

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        groups: list[str] | None = [] if _USER else None
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                user=_USER,
                group=_USER,
                extra_groups=groups,
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        """Stops the server as a crash would, connections and all."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    def remove(self) -> None:
        """Stops the server and removes its folder."""
        self.stop()
        shutil.rmtree(self._folder)

    def url(self, database: str) -> str:
        """Where `database` is, password included."""
        password = PASSWORD.replace("/", "%2F").replace("@", "%40")
        return f"postgresql://fedhds:{password}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        name = f"test{self._databases}"
        self.execute("postgres", f"create database {name}")
        return self.url(name)

    def execute(self, database: str, statement: str) -> None:
        """Runs one statement, outside of any transaction; `database` is a name or a URL."""
        url = database if "://" in database else self.url(database)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def cut(self, url: str) -> None:
        """Breaks all connections to the database."""
        name = url.rpartition("/")[2]
        self.execute("postgres", f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")
