"""The processes of one run: started with their logs in files, ended with the simulation however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from fedhds.errors import FedhdsError

_BIN = Path(sys.executable).parent
_START_S = 300.0
_STOP_S = 30.0
_LAST_LINES = 12


class SimulationError(FedhdsError):
    """A process of the simulation failed."""


class Daemons:
    """The daemons of one run. Leaving the block ends those that still run."""

    def __init__(self, logs: Path, threads: int) -> None:
        self._logs = logs
        # The processes share this machine's cores: OpenMP threads that wait for each other made a run ten times slower.
        self._environment = {"OMP_NUM_THREADS": str(threads)} | {
            key: value for key, value in os.environ.items() if not key.startswith("FEDHDS_")
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Daemons:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, program: str, *flags: object) -> None:
        """Starts an installed program; its output is added to the log of that name."""
        command = [sys.executable, "-m", "fedhds.runtime.leash", str(_BIN / program), *map(str, flags)]
        with (self._logs / f"{name}.log").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment
            )

    def address(self, name: str, path: Path) -> str:
        """What the daemon `name` writes to `path` once it listens."""
        deadline = time.monotonic() + _START_S
        while not (path.exists() and path.read_text().strip()):
            self.running()
            if time.monotonic() > deadline:
                raise SimulationError(f"{name} does not listen after {_START_S:g} s; its log is {self._log(name)}")
            time.sleep(0.05)
        return path.read_text().strip()

    def running(self) -> bool:
        """Whether one still runs; raises SimulationError with the last lines of one that failed."""
        for name, process in self._processes.items():
            if process.poll():
                lines = self._log(name).read_text(errors="replace").splitlines()[-_LAST_LINES:]
                text = "\n".join(f"  {line}" for line in lines)
                raise SimulationError(
                    f"{name} ended with status {process.returncode}; the end of {self._log(name)}:\n{text}"
                )
        return any(process.poll() is None for process in self._processes.values())

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"
