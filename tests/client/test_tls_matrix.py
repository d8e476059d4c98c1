"""Who may talk to whom under mutual TLS, over real sockets: each way in which it goes wrong has its own message."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from fedhds.errors import CoordinatorUnreachable, EnrollmentRefused, FedhdsError, SettingsError
from fedhds.security.credentials import TlsFiles, server_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue, revoke
from fedhds.spec import RunSpec
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.rpc_client import CoordinatorClient
from fedhds_server.coordinator.admission import Admission, SiteList
from fedhds_server.rpc.federation import FederationServicer
from fedhds_server.run.state import RunState
from tests.support.tls_servers import issue_dated, lax_server

SITE, COORDINATOR = Role.SITE, Role.COORDINATOR


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Federation:
    """The authority's folder, another authority's, and a tool to date certificates."""

    folder: Path
    elsewhere: Path
    patch: pytest.MonkeyPatch

    def site(self) -> TlsFiles:
        return issue(self.folder, "hospital-a", role=SITE)

    def dated(self, role: Role, starts: int, ends: int) -> TlsFiles:
        return issue_dated(self.patch, self.folder, f"dated-{role}", role, starts, ends)

    def trusting(self) -> TlsFiles:
        """A stranger who trusts this federation's authority."""
        stranger = issue(self.elsewhere, "hospital-a", role=SITE)
        return TlsFiles(self.folder / "ca.crt", stranger.cert, stranger.key)

    def of_a_coordinator(self) -> TlsFiles:
        return issue(self.folder, "coordinator-2", role=COORDINATOR)

    def stolen(self) -> TlsFiles:
        thief, site = issue(self.folder, "thief", role=SITE), self.site()
        return TlsFiles(site.ca, site.cert, thief.key)

    def revoked(self) -> TlsFiles:
        site = self.site()
        revoke(self.folder, site.cert)
        return site


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    folder = init_authority(tmp_path / "certs").parent
    elsewhere = init_authority(tmp_path / "elsewhere").parent
    # A list that revokes somebody else, so that there is one.
    revoke(folder, issue(folder, "somebody", role=SITE).cert)
    return Federation(folder, elsewhere, monkeypatch)


@asynccontextmanager
async def coordinator(federation: Federation, credentials: Any) -> AsyncIterator[str]:
    """A coordinator's port with the methods of sites and a revocation list; without credentials in the clear."""
    state = RunState(run_id="r", spec=RunSpec.of(model="m", rounds=1))

    async def post(decide: Callable[[RunState], Any]) -> None:
        decide(state)

    revoked = SiteList("--revoked", federation.folder / "ca.crl", authority=federation.folder / "ca.crt")
    own = cast(Any, SimpleNamespace(state=state, post=post, admission=Admission(revoked=revoked)))
    server = grpc.aio.server()
    FederationServicer(lambda: own).register(server)
    add = server.add_secure_port if credentials else server.add_insecure_port
    port = add("127.0.0.1:0", *([credentials] if credentials else []))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def enroll(target: str, files: TlsFiles | None, name: str = "hospital-a") -> pb.EnrollResponse:
    """As a site does, and gives up after the first failure."""
    client = CoordinatorClient(target, files, reconnect_timeout_s=0)
    try:
        request = pb.EnrollRequest(site=name, protocol_versions=[2], session=secrets.token_hex(32))
        answer = await client.call(client.federation.Enroll, request)
        assert isinstance(answer, pb.EnrollResponse)
        return answer
    finally:
        await client.close()


async def test_a_good_certificate_enrolls(federation: Federation) -> None:
    own = server_credentials(issue(federation.folder, "coordinator", role=COORDINATOR))
    async with coordinator(federation, own) as target:
        assert (await enroll(target, federation.site())).run_id == "r"


async def test_without_tls_on_both_sides_there_is_no_certificate_to_ask_for(federation: Federation) -> None:
    async with coordinator(federation, None) as target:
        assert (await enroll(target, None)).run_id == "r"


@pytest.mark.parametrize(
    ("shown", "error", "message"),
    [
        (lambda made: None, CoordinatorUnreachable, "speaks TLS, but no --tls-\\* flags were given"),
        (Federation.trusting, CoordinatorUnreachable, "is not signed by the authority in"),
        (lambda made: made.dated(SITE, -9, -1), CoordinatorUnreachable, "expired on .*--renew"),
        (lambda made: made.dated(SITE, 1, 9), CoordinatorUnreachable, "is valid only from .*this machine's clock"),
        (Federation.stolen, CoordinatorUnreachable, "does not belong to the certificate"),
        (Federation.revoked, EnrollmentRefused, "the certificate of 'hospital-a' is revoked"),
        (Federation.of_a_coordinator, SettingsError, "a client needs one issued with --role site"),
    ],
    ids=["none", "other authority", "expired", "not yet valid", "another's key", "revoked", "another role"],
)
async def test_what_a_coordinator_does_not_take(
    shown: Callable[[Federation], TlsFiles | None], error: type[FedhdsError], message: str, federation: Federation
) -> None:
    files = shown(federation)
    own = server_credentials(issue(federation.folder, "coordinator", role=COORDINATOR))
    async with coordinator(federation, own) as target:
        with pytest.raises(error, match=message):
            await enroll(target, files)


async def test_a_certificate_is_for_its_own_name(federation: Federation) -> None:
    own = server_credentials(issue(federation.folder, "coordinator", role=COORDINATOR))
    async with coordinator(federation, own) as target:
        with pytest.raises(EnrollmentRefused, match="hospital-b"):
            await enroll(target, federation.site(), "hospital-b")


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (lambda made: None, "does not speak TLS; drop --tls-ca"),
        (lambda made: lax_server(issue(made.elsewhere, "c", role=COORDINATOR)), "is not from the authority in"),
        (lambda made: lax_server(made.dated(COORDINATOR, -9, -1)), "certificate has expired"),
        (lambda made: lax_server(made.dated(COORDINATOR, 1, 9)), "is not valid yet; check the clocks"),
        (lambda made: lax_server(issue(made.folder, "b", role=SITE)), "is not a coordinator's|does not name the host"),
    ],
    ids=["plaintext", "untrusted", "expired", "not yet valid", "a site that poses"],
)
async def test_what_a_site_does_not_take(
    shown: Callable[[Federation], Any], message: str, federation: Federation
) -> None:
    credentials = shown(federation)
    async with coordinator(federation, credentials) as target:
        with pytest.raises(CoordinatorUnreachable, match=message):
            await enroll(target, federation.site())
