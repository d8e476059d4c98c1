"""Starts console scripts as real processes for the end-to-end tests."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.programs import BIN

PATIENCE_S = 300.0


class Daemon:
    """A running console script; its output goes to a file so that no pipe can fill up."""

    def __init__(
        self,
        log: Path,
        program: str,
        *flags: object,
        environment: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        installed: bool = False,
    ) -> None:
        self.log = log
        words = [*prefix, str(BIN / program), *map(str, flags)]
        variables = programs.environment(environment)
        with log.open("w") as output:
            self.process = programs.start(words, variables, output=output, errors=output, installed=installed)

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {timeout_s:g} s:\n{self.text}") from None

    def wait_for(self, words: str, timeout_s: float = PATIENCE_S) -> None:
        """Returns once the output holds `words`."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            ended = self.process.poll()
            if words in self.text:
                return
            if ended is not None or time.monotonic() > deadline:
                raise AssertionError(f"no {words!r} (exit status {ended}):\n{self.text}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it at once, as a power cut would."""
        self.process.kill()
        self.process.wait()


@contextmanager
def file_system(federation: Federation, mib: int) -> Iterator[Path]:
    """The folder `small` as a file system of its own; what runs on it is ended before it goes."""
    folder = federation.folder / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    federation.stop()
    subprocess.run(["umount", str(folder)], check=True)


class Federation:
    """Processes of one test, all ended with it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.daemons: list[Daemon] = []
        self.tls: Path | None = None
        self.prefix: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        # Whether all programs are the installed scripts, see `programs.start`.
        self.installed = False

    def start(self, name: str, program: str, *flags: object, prefix: tuple[str, ...] = ()) -> Daemon:
        """Starts a console script whose log is called `name`."""
        number = len(self.daemons)
        log = self.folder / f"{number:02d}-{name}.log"
        daemon = Daemon(
            log,
            program,
            *flags,
            environment=self.environment,
            prefix=(*self.prefix, *prefix),
            installed=self.installed,
        )
        self.daemons.append(daemon)
        return daemon

    def server(
        self, *flags: object, run: str = "run", listen: str = "127.0.0.1:0", may_stand_by: bool = False
    ) -> Daemon:
        """Starts a coordinator and waits until it leads its run."""
        daemon = self.start("server", "fedhds-server", *self.server_flags(*flags, run=run, listen=listen))
        daemon.wait_for("listens on")
        if not may_stand_by:
            # "run ... begins", or "going on with run ...".
            daemon.wait_for(" run ")
        return daemon

    def server_flags(self, *flags: object, run: str = "run", listen: str = "127.0.0.1:0") -> list[object]:
        """Flags of a small run."""
        return [
            f"--model={self.model}",
            "--max-length=256",
            "--max-new-tokens=4",
            "--lora-rank=2",
            f"--listen={listen}",
            f"--run-folder={self.folder / run}",
            *self._tls_flags("coordinator"),
            *flags,
        ]

    def address(self, run: str = "run") -> str:
        """Where the coordinator listens."""
        return (self.folder / run / "address").read_text().strip()

    def client(self, name: str, *flags: object, server: str | None = None) -> Daemon:
        """Starts a site called `name`, with a state folder and an adapter folder of its own."""
        return self.start(name, "fedhds-client", *self.client_flags(name, *flags, server=server))

    def client_flags(self, name: str, *flags: object, server: str | None = None) -> list[object]:
        """Flags of a site."""
        named = any(str(flag).startswith("--name") for flag in flags)
        return [
            f"--server={server or self.address()}",
            f"--state={self.folder / 'state' / name}",
            f"--ledger={self.folder / 'ledger.db'}",
            f"--out={self.folder / 'out' / name}",
            *(self._tls_flags(name) if self.tls else [] if named else [f"--name={name}"]),
            *flags,
        ]

    def _tls_flags(self, name: str) -> list[object]:
        if not self.tls:
            return []
        return [
            f"--tls-ca={self.tls / 'ca.crt'}",
            f"--tls-cert={self.tls / name}.crt",
            f"--tls-key={self.tls / name}.key",
        ]

    def stop(self) -> None:
        """Ends whatever still runs."""
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
