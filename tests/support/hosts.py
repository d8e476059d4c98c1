"""Folders in place of hosts, on which documented commands run as they stand but for names, ports and paths.

What changes a host as a whole is stood in for: systemctl by the file of that name here, useradd and chown by nothing,
the installation by this environment. All else is the real thing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.support.federation import PATIENCE_S
from tests.support.pages import Block, blocks
from tests.support.programs import BIN

_STAND_INS = {
    "systemctl": f'exec {sys.executable} {Path(__file__).with_name("systemctl.py")} "$@"',
    "useradd": "exit 0",
    "chown": "exit 0",
}
# A whole run, on a machine that other tests use too.
_RUN_S = 300.0
_PATHS = re.compile(r"(?<![\w./:])/(?=(?:etc|var|opt|srv)/)")


def steps(page: str, host: str, step: str | None = None) -> list[Block]:
    """The blocks of a page for a host, of one step of it; without one, those that everybody goes through."""
    return [block for block in blocks(page) if block.marks.get("on") == host and block.marks.get("step") == step]


class Hosts:
    """Hosts that reach each other by loopback; `replaced` holds words of the pages and what they are here."""

    def __init__(self, folder: Path, replaced: Mapping[str, str]) -> None:
        self._folder = folder
        self._replaced = {
            "fed.example.org": "localhost",
            "0.0.0.0": "127.0.0.1",
            "8470": str(_free_port()),
            "9470": str(_free_port()),
            "RestartSec=5": "RestartSec=1",
            **replaced,
        }
        stand_ins = folder / "bin"
        stand_ins.mkdir()
        for name, line in _STAND_INS.items():
            (stand_ins / name).write_text(f"#!/bin/sh\n{line}\n")
            (stand_ins / name).chmod(0o755)
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("FEDHDS_", "AWS_"))}
        self._environment = variables | {
            "PATH": f"{stand_ins}:{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def root(self, host: str) -> Path:
        """A host's root, made when it is first asked for."""
        root = self._folder / host
        if not root.exists():
            for name in ("etc/systemd/system", "var/lib/fedhds", "var/backups", "opt", "root"):
                (root / name).mkdir(parents=True)
            (root / "opt" / "fedhds").symlink_to(BIN.parent)
        return root

    def home(self, host: str) -> Path:
        """Where commands run on a host."""
        return self.root(host) / "root"

    def hand_over(self, name: str, host: str) -> None:
        """Takes a folder or a file of the authority's to a host."""
        source = self.home("authority") / name
        if source.is_dir():
            shutil.copytree(source, self.home(host) / source.name)
        else:
            shutil.copy(source, self.home(host))

    def follow(self, host: str, to_do: list[Block], replaced: Mapping[str, str] | None = None) -> str:
        """Does on a host what blocks say, one after another; returns what they print."""
        assert to_do
        printed = ""
        for block in to_do:
            text = block.text
            for word, here in (*(replaced or {}).items(), *self._replaced.items()):
                text = text.replace(word, here)
            text = _PATHS.sub(f"{self.root(host)}/", text)
            if "file" in block.marks:
                (self.root(host) / block.marks["file"].lstrip("/")).write_text(text)
            else:
                printed += self._run(host, text)
        return printed

    def _run(self, host: str, text: str) -> str:
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.home(host),
            env=self._environment | {"HOST_ROOT": str(self.root(host))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        assert ran.returncode == 0, f"{text}\nends with {ran.returncode}:\n{ran.stdout}\n{self._logs()}"
        return ran.stdout

    def log(self, host: str, unit: str) -> str:
        """What a unit has printed in all its lives."""
        path = self.root(host) / f"{unit}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, host: str, unit: str, words: str, times: int = 1) -> None:
        """Returns once a unit has printed what matches `words` so many times."""
        deadline = time.monotonic() + PATIENCE_S
        while len(re.findall(words, self.log(host, unit))) < times:
            assert time.monotonic() < deadline, f"{host} does not say {words!r}:\n{self._logs()}"
            time.sleep(0.02)

    def wait_for_end(self, host: str, unit: str) -> None:
        """Returns once a unit has ended well by itself."""
        pid, deadline = self.root(host) / f"{unit}.pid", time.monotonic() + _RUN_S
        while pid.exists():
            assert time.monotonic() < deadline, f"{unit} of {host} does not end:\n{self._logs()}"
            time.sleep(0.05)
        assert (self.root(host) / f"{unit}.status").read_text() == "0", self._logs()

    def cut_power(self, host: str, unit: str) -> None:
        """Ends a unit, and what would start it again, at once."""
        pid = self.root(host) / f"{unit}.pid"
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        pid.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends everything."""
        for pid in self._folder.glob("*/*.pid"):
            self.cut_power(pid.parent.name, pid.stem)

    def _logs(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()[-4000:]}" for path in sorted(self._folder.glob("*/*.log")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
