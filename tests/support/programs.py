"""Starts programs of fedhds: as forks, which is fast, or as they are installed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from tests.support.forkserver import Forked, ForkServer

BIN = Path(sys.executable).parent
# What programs read when they have begun; other variables are for imports, for the interpreter or for the loader.
_READ_LATE = ("FEDHDS_", "AWS_", "NO_COLOR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "GRPC_PROXY", "ALL_PROXY")


def environment(variables: dict[str, str] | None = None) -> dict[str, str]:
    """Variables of an offline program with one thread: this process's, without those of fedhds and pytest, and more."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FEDHDS_", "PYTEST_"))}
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (variables or {})


_lock = threading.Lock()


@functools.cache
def _fork_server() -> ForkServer:
    return ForkServer(environment())


def start(
    words: list[str], variables: dict[str, str], *, output: IO[Any], errors: IO[Any], installed: bool = False
) -> subprocess.Popen[Any] | Forked:
    """Starts a command with exactly these variables.

    A fork stands for a console script of fedhds or `python FILE`, maybe behind `ip netns exec NAME`, unless `installed`
    asks for the real thing or a variable differs that is read before the program begins.
    """
    namespace, script = "", words
    if words[:3] == ["ip", "netns", "exec"]:
        namespace, script = words[3], words[4:]
    if script[0] == sys.executable and script[1].endswith(".py"):
        script = script[1:]
    elif not script[0].startswith(f"{BIN}/fedhds"):
        installed = True
    if not installed:
        with _lock:
            server = _fork_server()
        differing = {name for name, _ in variables.items() ^ server.environment.items()}
        if all(name.upper().startswith(_READ_LATE) for name in differing):
            return server.start(script, variables, output, errors, namespace=namespace)
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=variables)


def run(
    program: str,
    *flags: object,
    variables: dict[str, str] | None = None,
    timeout_s: float = 120,
    installed: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a console script to its end, and returns its exit status and what it printed."""
    words = [str(BIN / program), *map(str, flags)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start(words, environment(variables), output=output, errors=errors, installed=installed)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, status, output.read(), errors.read())


def processes_of(folder: Path) -> list[int]:
    """Processes whose command names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in words:
            found.append(int(entry.name))
    return found
