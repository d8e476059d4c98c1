"""Sites that run a test's code first, and what that code may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.federation import Federation

# In a site's process, by way of sitecustomize: training waits for the file GATE, and can be stopped meanwhile.
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


@contextmanager
def sabotaged(federation: Federation, code: str) -> Iterator[None]:
    """Sites that are started within run `code` first."""
    folder = federation.folder / "sabotage"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    federation.environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    yield
    federation.environment = {}
