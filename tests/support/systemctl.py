"""Stands in for systemd where documented commands run on a folder in place of a host: `systemctl VERB [--now] UNIT`.

A unit's process is started, and started again when it fails, by a process of its own, `systemctl.py supervise UNIT`, as
long as the file UNIT.pid lasts; what it prints goes to UNIT.log. HOST_ROOT is the folder.
"""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_ROOT = Path(os.environ["HOST_ROOT"])
_STOP_S = 30.0


def _unit(name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    path = _ROOT / "etc" / "systemd" / "system" / f"{name}.service"
    if not parser.read(path):
        sys.exit(f"Unit {name}.service not found.")
    return parser["Service"]


def _environment(service: configparser.SectionProxy) -> dict[str, str]:
    path = Path(service["EnvironmentFile"].removeprefix("-"))
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(os.environ) | dict(shlex.split(line)[0].split("=", 1) for line in lines if line)


def supervise(name: str) -> None:
    """Keeps a unit running until it ends well, ends in a way that starting again does not fix, or is stopped."""
    service, pid = _unit(name), _ROOT / f"{name}.pid"
    process: subprocess.Popen[bytes] | None = None
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True
        if process:
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    pid.write_text(str(os.getpid()))
    final = {0, int(service["RestartPreventExitStatus"])}
    status = -1
    while not stopped and status not in final:
        with (_ROOT / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                shlex.split(service["ExecStart"]), stdout=log, stderr=log, env=_environment(service)
            )
        if stopped:
            process.terminate()
        status = process.wait()
        (_ROOT / f"{name}.status").write_text(str(status))
        if not stopped and status not in final:
            time.sleep(float(service["RestartSec"]))
    pid.unlink()


def _start(name: str) -> None:
    pid = _ROOT / f"{name}.pid"
    if pid.exists():
        return
    _unit(name)
    # It is filled, and removed at the end, by the supervisor.
    pid.touch()
    quiet = subprocess.DEVNULL
    subprocess.Popen(
        [sys.executable, __file__, "supervise", name], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
    )


def _stop(name: str) -> None:
    pid, deadline, told = _ROOT / f"{name}.pid", time.monotonic() + _STOP_S, False
    while pid.exists():
        # Between two looks the unit may end by itself.
        with suppress(FileNotFoundError, ProcessLookupError):
            if not told and (number := pid.read_text()):
                os.kill(int(number), signal.SIGTERM)
                told = True
        if time.monotonic() > deadline:
            sys.exit(f"{name} does not stop")
        time.sleep(0.05)


def main() -> None:
    """Does what systemctl would."""
    verb, *words = sys.argv[1:]
    names = [word for word in words if word != "--now"]
    for name in names:
        if verb == "supervise":
            supervise(name)
        if verb in ("stop", "restart"):
            _stop(name)
        if verb in ("start", "restart") or (verb == "enable" and "--now" in words):
            _start(name)
    if verb not in ("supervise", "stop", "start", "restart", "enable", "disable", "daemon-reload"):
        sys.exit(f"unknown verb {verb}")


if __name__ == "__main__":
    main()
