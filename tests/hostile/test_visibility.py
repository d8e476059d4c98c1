"""Who sees what: users of the coordinator's host, sites of each other, and callers without a site."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fedhds.security.credentials import channel_credentials
from fedhds.security.identity import Role
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import status_pb2, status_pb2_grpc
from tests.hostile.conftest import Secured, Undisturbed
from tests.support import programs
from tests.support.attackers import SecureFederation
from tests.support.hostile import until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def federation(secured: Secured, undisturbed: Undisturbed) -> Iterator[SecureFederation]:
    federation = secured("--rounds=1", "--min-sites=2")
    until(lambda: federation.state.round_number == 1)
    yield federation
    federation.finish()
    assert federation.adapter == undisturbed("--rounds=1")


def seen_by(federation: SecureFederation, name: str, role: Role) -> status_pb2.GetStatusResponse:
    credentials = channel_credentials(federation.certificate(name, role))
    with grpc.secure_channel(federation.address(), credentials) as channel:
        answer: status_pb2.GetStatusResponse = status_pb2_grpc.OperationsStub(channel).GetStatus(
            status_pb2.GetStatusRequest(), timeout=60
        )
        return answer


def test_a_site_sees_itself_and_an_operator_all(federation: SecureFederation) -> None:
    whole = seen_by(federation, "boss", Role.OPERATOR)
    assert {"a", "b"} <= {site.site for site in whole.sites}
    assert "waiting for a, b" in whole.message
    assert whole.journal
    spy = federation.attacker("spy")
    spy.enroll()
    seen = seen_by(federation, "spy", Role.SITE)
    assert [site.site for site in seen.sites] == ["spy"]
    assert (seen.run_id, seen.phase, seen.round_number) == (whole.run_id, "training", 1)
    assert seen.message == "round 1 of 1: 0 of 2 updates"
    assert not seen.journal
    assert not seen.checkpoint
    assert not seen.model_given_by
    assert seen.bytes_received < 1000
    answer = spy.stub.NextTask(pb.NextTaskRequest(session=spy.session, wait_s=0))
    assert answer.wait.reason == "round 1 of 1: 0 of 2 updates"
    spy.leave()


def test_the_command_shows_a_site_its_own_part(federation: SecureFederation) -> None:
    files = federation.certificate("a")
    flags = (f"--server={federation.address()}", "--tls-ca", files.ca, "--tls-cert", files.cert, "--tls-key", files.key)
    shown = programs.run("fedhds", "status", "--json", *flags)
    assert shown.returncode == 0, shown.stderr
    assert [site["site"] for site in json.loads(shown.stdout)["sites"]] == ["a"]
    assert "of 2 updates" in programs.run("fedhds", "status", *flags).stdout


def test_other_users_of_the_host_read_nothing(federation: SecureFederation) -> None:
    def open_to_others(folder: Path) -> list[Path]:
        return [path for path in folder.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o077]

    assert stat.S_IMODE(federation.run.stat().st_mode) == 0o700
    assert {"address", "artifacts", "run.db"} <= {path.name for path in federation.run.iterdir()}
    assert open_to_others(federation.run) == []
    (site, *_) = (federation.folder / "state" / "a").glob("*/session")
    assert stat.S_IMODE(site.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(site.stat().st_mode) == 0o600


def test_a_damaged_lock_or_session_is_told_without_a_traceback(federation: SecureFederation) -> None:
    folder = federation.folder / "other"
    (folder / "lock").mkdir(parents=True)
    odd = federation.start("odd", "fedhds-server", *federation.server_flags("--rounds=1", run="other"))
    assert odd.wait() == 1, odd.text
    assert f"the lock {folder}/lock is no file; delete it" in odd.text
    federation.certificate("c")
    c = federation.client("c", f"--data={federation.folder / 'a.jsonl'}")
    c.wait_for("enrolled in run")
    c.kill()
    (kept,) = (federation.folder / "state" / "c").glob("*/session")
    kept.write_bytes(b"\xff\x00junk")
    (kept.parent / "session.next").write_bytes(b"\xff")
    c = federation.client("c", f"--data={federation.folder / 'a.jsonl'}")
    c.wait_for("enrolled in run")
    c.kill()
    (kept.parent / "lock").unlink()
    (kept.parent / "lock").mkdir()
    c = federation.client("c", f"--data={federation.folder / 'a.jsonl'}")
    assert c.wait() == 1
    assert "/lock is no file; delete it" in c.text
    assert "Traceback" not in odd.text + c.text
    # The run's end would wait for it for a minute.
    with grpc.secure_channel(
        federation.address(), channel_credentials(federation.certificate("boss", Role.OPERATOR))
    ) as channel:
        status_pb2_grpc.OperationsStub(channel).Evict(status_pb2.EvictRequest(site="c", reason="it is killed"))
