"""`fedhds doctor` as operators call it."""

from __future__ import annotations

import subprocess

from tests.support import programs


def doctor(*flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What it prints, and its exit status."""
    return programs.run("fedhds", "doctor", *flags, variables=environment)


def states(ran: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Check to state, by the lines that people read."""
    assert ran.stderr == ""
    found = {}
    for line in ran.stdout.splitlines():
        state, _, rest = line.partition(" ")
        found[rest.lstrip().partition(":")[0].partition(" ")[0]] = state
    return found
