"""The end of a run: a site that has a part in the adapter gets it, also when it is away or cannot write it."""

from __future__ import annotations

import signal

import pytest

from fedhds_server.run.state import Stage
from tests.hostile.conftest import Secured, Undisturbed
from tests.support.hostile import until
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e


def test_a_contributor_that_is_restarted_and_has_no_room_still_gets_the_adapter(
    secured: Secured, undisturbed: Undisturbed
) -> None:
    federation = secured("--rounds=1", "--min-sites=2", names="a")
    federation.certificate("b")
    rows = write_rows(federation.folder / "b.jsonl", {"b": 8})
    b = federation.client("b", f"--data={rows}")
    b.wait_for("round 1 trained in")
    until(lambda: "b" in (federation.state.stage or Stage(kind="", round_number=0)).replies)
    b.process.send_signal(signal.SIGTERM)
    assert b.wait() == 143, b.text
    federation.coordinator.wait_for("site b left")
    federation.open_gate()
    (a,) = federation.sites
    assert a.wait() == 0, a.text
    # The others have gone; the coordinator waits for b.
    assert federation.coordinator.process.poll() is None
    blocking = federation.folder / "out" / "b" / "adapter_config.json"
    blocking.mkdir(parents=True)
    b = federation.client("b", f"--data={rows}")
    b.wait_for("b: the final adapter is not written: cannot write")
    assert federation.coordinator.process.poll() is None
    blocking.rmdir()
    assert b.wait() == 0, b.text
    federation.finish()
    assert (federation.folder / "out" / "b" / "adapter_model.safetensors").read_bytes() == federation.adapter
    assert federation.adapter == undisturbed("--rounds=1")
