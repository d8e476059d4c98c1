"""Sites that run a test's code first, and what that code may be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.federation import Federation

# In a site's process: training waits for the file GATE, and can be stopped meanwhile.
WAITING = """
import time
from pathlib import Path
import fedhds_client.training.loop as training
from fedhds_client.computation import Cancelled

honest = training.train

def train(*arguments, cancelled, **options):
    while not Path({gate!r}).exists():
        if cancelled():
            raise Cancelled("training was stopped")
        time.sleep(0.05)
    return honest(*arguments, cancelled=cancelled, **options)

training.train = train
"""


_GO_ON = """
import runpy
import sys

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextmanager
def sabotaged(federation: Federation, code: str) -> Iterator[None]:
    """Sites that are started within run `code` first."""
    script = federation.folder / "sabotage.py"
    script.write_text(code + _GO_ON)
    federation.prefix = (sys.executable, str(script))
    yield
    federation.prefix = ()
