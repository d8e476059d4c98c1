"""What the daemons write: bars and whole lines on a terminal, lines without control characters elsewhere, JSON."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedhds.errors import NameInUse, SettingsError
from tests.support.federation import PATIENCE_S, Federation
from tests.support.programs import BIN
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

CSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING|ERROR) +\S.*")
RUN = ("--rounds=2", "--min-sites=1", "--min-evaluators=1", "--selection-budget=4")


class Terminal:
    """A console script on a terminal of 80 columns; `text` is what it has written there."""

    def __init__(self, program: str, *flags: object) -> None:
        self.text = ""
        master, slave = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDHDS_")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "80"}
        words = [str(BIN / program), *map(str, flags)]
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self._reader = threading.Thread(target=self._read, args=(master,))
        self._reader.start()

    def _read(self, master: int) -> None:
        # The other end being closed reads as an error.
        with contextlib.suppress(OSError):
            while content := os.read(master, 1 << 16):
                self.text += content.decode(errors="replace")
        os.close(master)

    def wait(self) -> int:
        """The exit status, when all has been read."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status


@contextlib.contextmanager
def on_terminal(program: str, *flags: object) -> Iterator[Terminal]:
    terminal = Terminal(program, *flags)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.wait()


def site_flags(federation: Federation, *flags: object) -> list[object]:
    rows = write_rows(federation.folder / "a.jsonl", {"tea": 12, "sun": 12})
    return federation.client_flags("a", f"--data={rows}", f"--eval-data={rows}", *flags)


def objects(text: str) -> list[dict[str, Any]]:
    """Every line, all of which must be JSON objects."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.long
def test_on_a_terminal_bars_and_log_lines_leave_each_other_whole(federation: Federation) -> None:
    server = federation.server(*RUN)
    with on_terminal("fedhds-client", *site_flags(federation)) as client:
        assert client.wait() == 0, client.text
    assert server.wait() == 0
    for doing in ("selecting", "training, round 1", "training, round 2", "evaluating", "sending the update, round 1"):
        assert re.search(rf"a: {doing}.*━", client.text), doing
    # What stays when bars have been drawn over: lines, from their first character to their last.
    lines = [line.rpartition("\r")[2] for line in CSI.sub("", client.text).replace("\r\n", "\n").split("\n")]
    said = [line for line in lines if line and "━" not in line]
    assert all(LINE.fullmatch(line) for line in said), said
    # Longer than the terminal is wide.
    assert any(
        re.search(rf"a: enrolled in run \w+ \({federation.model}, 2 rounds of fedhds-aligned\)$", line) for line in said
    )
    # The cursor is back.
    assert client.text.count("\x1b[?25h") == client.text.count("\x1b[?25l") > 0


def test_elsewhere_there_are_lines_without_control_characters(federation: Federation) -> None:
    server = federation.server(*RUN)
    client = federation.start("a", "fedhds-client", *site_flags(federation))
    assert [server.wait(), client.wait()] == [0, 0], client.text
    for daemon in (server, client):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x1b]", daemon.text), daemon.text
        assert all(LINE.fullmatch(line) for line in daemon.text.splitlines()), daemon.text


def test_json_has_an_object_per_line_that_says_run_site_and_round(federation: Federation) -> None:
    begun = datetime.now(UTC)
    server = federation.server(*RUN, "--log-format=json", may_stand_by=True)
    client = federation.start("a", "fedhds-client", *site_flags(federation, "--log-format=json"))
    assert [server.wait(), client.wait()] == [0, 0], client.text
    told, of_site = objects(server.text), objects(client.text)
    for line in (*told, *of_site):
        assert set(line) <= {"time", "level", "logger", "message", "run", "site", "round"}
        assert line["time"].endswith("Z")
        assert timedelta(0) < datetime.fromisoformat(line["time"]) - begun + timedelta(seconds=1) < timedelta(minutes=5)
    (run,) = {line["run"] for line in of_site if "run" in line}
    (closed,) = [line for line in told if line["message"].startswith("round 2 closed")]
    assert (closed["run"], closed["logger"]) == (run, "fedhds_server.coordinator.coordinator")
    assert "round" not in closed
    # Logged in the thread that computes.
    (trained,) = [line for line in of_site if "round 2 trained" in line["message"]]
    assert (trained["run"], trained["site"], trained["round"]) == (run, "a", 2)


def test_errors_name_their_code_in_lines_in_json_and_over_the_wire(federation: Federation) -> None:
    federation.server(*RUN, "--min-sites=2")
    flags = site_flags(federation)
    federation.start("a", "fedhds-client", *flags).wait_for("enrolled in run")
    # The name is held by a live process: the coordinator refuses, and its answer carries the class and so the code.
    elsewhere = f"--state={federation.folder / 'elsewhere'}"
    refused = federation.start("b", "fedhds-client", *flags, elsewhere)
    assert refused.wait() == 1
    assert refused.text.endswith(f"[{NameInUse.code}]\n")
    logged = federation.start("c", "fedhds-client", *flags, elsewhere, "--log-format=json")
    assert logged.wait() == 1
    last = objects(logged.text)[-1]
    assert (last["level"], last["code"]) == ("ERROR", NameInUse.code)
    assert last["message"].startswith("fedhds-client: ")


@pytest.mark.parametrize("program", ["fedhds-server", "fedhds-client"])
@pytest.mark.parametrize("flag", ["--no-such-flag", "--listen=nowhere", "--server=nowhere", "--log-format=xml"])
def test_a_mistake_in_a_flag_is_told_with_its_code(tmp_path: Path, program: str, flag: str) -> None:
    needed = "--model=m" if program == "fedhds-server" else "--data=a.jsonl"
    ran = subprocess.run([BIN / program, needed, flag], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.endswith(f"[{SettingsError.code}]\n")
