"""Observers hear of everything in order, and neither what they raise nor that they stand still reaches the run."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedhds.spec import RunSpec
from fedhds_server.observers import ObserverContext, RunObserver, base
from fedhds_server.observers.base import Observers
from fedhds_server.run.state import RunState
from fedhds_server.storage.base import JournalEntry

SPEC = RunSpec.of(model="m", rounds=1)
STATE = RunState(run_id="r", spec=SPEC)


class Listening(RunObserver):
    def __init__(self, folder: Path) -> None:
        super().__init__(ObserverContext(folder, SPEC))
        self.messages: list[str] = []

    def recorded(self, entry: JournalEntry) -> None:
        self.messages.append(entry.message)
        if entry.message == "1":
            raise ValueError("no tracking service")


class Standing(Listening):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.free = threading.Event()

    def recorded(self, entry: JournalEntry) -> None:
        super().recorded(entry)
        self.free.wait(20)


def journal(*numbers: int) -> list[JournalEntry]:
    return [JournalEntry(0.0, str(number)) for number in numbers]


async def test_all_is_told_in_order_whatever_an_observer_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listeners = [Listening(tmp_path), Listening(tmp_path)]
    observers = Observers(listeners)
    observers.started(STATE)
    for number in range(20):
        observers.committed(STATE, journal(number))
    await observers.close()
    assert [each.messages for each in listeners] == [[str(number) for number in range(20)]] * 2
    assert "the observer Listening failed" in caplog.text


async def test_an_observer_that_stands_still_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "_CLOSE_S", 0.1)
    standing = Standing(tmp_path)
    observers = Observers([standing])
    observers.started(STATE)
    observers.committed(STATE, journal(0, 2))
    await asyncio.wait_for(observers.close(), 5)
    assert "what is left is dropped" in caplog.text
    standing.free.set()
    observers._listeners[0].thread.join(5)
    assert standing.messages == ["0"]


async def test_an_observer_that_stands_still_keeps_no_other_waiting(tmp_path: Path) -> None:
    heard = threading.Event()

    class Quick(Listening):
        def recorded(self, entry: JournalEntry) -> None:
            super().recorded(entry)
            if entry.message == "2":
                heard.set()

    standing, quick = Standing(tmp_path), Quick(tmp_path)
    observers = Observers([standing, quick])
    observers.started(STATE)
    observers.committed(STATE, journal(0, 2))
    assert await asyncio.to_thread(heard.wait, 20)
    assert standing.messages in ([], ["0"])
    standing.free.set()
    await observers.close()
    assert standing.messages == quick.messages == ["0", "2"]


_STANDING = """
import asyncio, pathlib, threading
from fedhds_server.observers import base
from tests.server.test_observers import STATE, Standing, journal

async def main():
    observers = base.Observers([Standing(pathlib.Path())])
    observers.started(STATE)
    observers.committed(STATE, journal(0))
    await observers.close()

base._CLOSE_S = 0.1
Standing.recorded = lambda *_: threading.Event().wait()
asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_ends_while_an_observer_stands_still() -> None:
    subprocess.run([sys.executable, "-c", _STANDING], check=True, timeout=60)
