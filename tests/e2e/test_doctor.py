"""`fedhds doctor` as operators call it, against real coordinators: well, frozen, gone, and with another clock."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from tests.support.clocks import Clock
from tests.support.doctor import doctor, states
from tests.support.federation import Federation

pytestmark = pytest.mark.e2e


def test_a_site_that_is_well_and_then_one_thing_after_the_other(federation: Federation) -> None:
    certs = init_authority(federation.folder / "certs").parent
    issue(certs, "coordinator", role=Role.COORDINATOR)
    site = issue(certs, "hospital-a", role=Role.SITE)
    federation.tls = certs
    server = federation.server("--rounds=1", listen="localhost:0")
    # As a site's container has it: by the environment alone.
    environment = {
        "FEDHDS_SERVER": federation.address(),
        "FEDHDS_STATE": str(federation.folder),
        "FEDHDS_TLS_CA": str(site.ca),
        "FEDHDS_TLS_CERT": str(site.cert),
        "FEDHDS_TLS_KEY": str(site.key),
    }
    well = doctor(**environment)
    found = states(well)
    assert list(found) == [
        "versions", "fedhds-server", "fedhds-client", "gpu", "disk", "certificates", "server", "clock"
    ]  # fmt: skip
    assert {found[check] for check in found if check != "gpu"} <= {"ok", "warning"}, well.stdout
    assert (found["certificates"], found["server"], found["clock"]) == ("ok", "ok", "ok"), well.stdout
    assert well.returncode == 0
    server.process.send_signal(signal.SIGSTOP)
    frozen = doctor(**environment)
    assert (frozen.returncode, states(frozen)["server"], states(frozen)["clock"]) == (1, "failed", "skipped")
    assert "does not answer within 5 s" in frozen.stdout
    server.kill()
    gone = doctor("--json", **environment)
    assert gone.returncode == 1
    answer = json.loads(gone.stdout)
    assert answer["ok"] is False
    (failed,) = [check for check in answer["checks"] if check["state"] == "failed"]
    assert failed["check"] == f"server {environment['FEDHDS_SERVER']}"
    assert failed["message"].endswith("[FH52]")


def test_certificates_that_cannot_serve_are_not_shown_to_anybody(tmp_path: Path) -> None:
    certs = init_authority(tmp_path / "certs").parent
    site, other = (issue(certs, name, role=Role.SITE) for name in "ab")
    flags = (f"--tls-ca={site.ca}", f"--tls-cert={site.cert}", f"--tls-key={other.key}", "--server=localhost:1")
    ran = doctor(*flags)
    assert ran.returncode == 1
    assert (states(ran)["certificates"], states(ran)["server"]) == ("failed", "skipped")


@pytest.mark.parametrize(("offset", "state"), [("+60", "warning"), ("-2h", "failed")])
def test_a_coordinators_clock_that_is_off_is_seen_from_a_site(federation: Federation, offset: str, state: str) -> None:
    clock = Clock(federation.folder / "clock")
    clock.jump(offset)
    federation.environment = clock.environment()
    federation.server("--rounds=1")
    ran = doctor(f"--server={federation.address()}")
    assert (states(ran)["server"], states(ran)["clock"]) == ("ok", state), ran.stdout
    assert ran.returncode == (state == "failed")


def test_a_settings_file_is_not_passed_over_in_silence() -> None:
    assert states(doctor(FEDHDS_CONFIG="site.yaml"))["config"] == "warning"
