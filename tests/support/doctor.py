"""`fedhds doctor` as operators call it."""

from __future__ import annotations

import os
import subprocess

from tests.support.federation import BIN


def doctor(*flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FEDHDS_")}
    return subprocess.run(
        [str(BIN / "fedhds"), "doctor", *map(str, flags)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def states(ran: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Check to state, by the lines that people read."""
    assert ran.stderr == ""
    found = {}
    for line in ran.stdout.splitlines():
        state, _, rest = line.partition(" ")
        found[rest.lstrip().partition(":")[0].partition(" ")[0]] = state
    return found
