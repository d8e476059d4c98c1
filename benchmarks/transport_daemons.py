"""The processes that the transport benchmarks watch: coordinators and load processes, their CPU, memory and packets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]

# Load processes of one measurement; sites are divided over them.
PROCESSES = 4


@contextmanager
def coordinator(run: Path, certificates: Path | None, *flags: object) -> Iterator[tuple[int, str]]:
    """A `fedhds-server`: its process id and address; ended with the context."""
    command = [Path(sys.executable).with_name("fedhds-server"), "--model", "m", "--selection-strategy", "full", *flags]
    command += ["--listen", "127.0.0.1:0", "--run-folder", run, "--heartbeat-timeout", 600, "--log-level", "WARNING"]
    if certificates:
        files = (certificates / name for name in ("ca.crt", "coordinator.crt", "coordinator.key"))
        command += [f"--tls-{name}={path}" for name, path in zip(("ca", "cert", "key"), files, strict=True)]
    process = subprocess.Popen(list(map(str, command)))
    try:
        address = run / "address"
        while not (address.exists() and (target := address.read_text().strip())):
            if process.poll() is not None:
                raise SystemExit("fedhds-server did not start")
            time.sleep(0.02)
        yield process.pid, target
    finally:
        process.kill()
        process.wait()


@contextmanager
def loads(role: str, arguments: list[Line]) -> Iterator[tuple[Iterator[Line], list[subprocess.Popen[bytes]]]]:
    """Load processes, and before them the lines that they print, as they come; ended with the context."""
    merged, pipe = os.pipe()
    processes = []
    with os.fdopen(merged) as lines:
        try:
            for each in arguments:
                command = [sys.executable, "-m", "benchmarks.transport_load", role, json.dumps(each)]
                # One pipe for all: what is shorter than 4 KiB is written to it at once.
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=pipe))
            os.close(pipe)
            yield map(json.loads, lines), processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def tls_files(certificates: Path, number: int) -> list[str]:
    """CA, certificate and key of the load process `number`."""
    return [str(certificates / name) for name in ("ca.crt", f"load-{number}.crt", f"load-{number}.key")]


def cpu_s(process: int) -> float:
    """Seconds of processor time, user and system, that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(process: int, name: str) -> float:
    """A line of /proc/PID/status in megabytes; VmHWM is the highest resident set so far."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return round(int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6, 1)


def wire_bytes() -> int:
    """Bytes of all packets that this network namespace's loopback has carried."""
    loopback = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(loopback.split(":")[1].split()[0])
