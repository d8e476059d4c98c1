"""The authority: what it writes, what strict verifiers say of it, and what it refuses."""

from __future__ import annotations

import os
import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedhds.errors import UsageError
from fedhds.security import pki
from fedhds.security.identity import Role
from fedhds.security.pki import expiry, init_authority, issue

_CLIENT = [ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return init_authority(tmp_path / "certs").parent


def _load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _names(path: Path) -> x509.SubjectAlternativeName:
    return _load(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_authority_and_leaves_pass_the_strict_verifier(authority: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    for name, role, purpose in [
        ("coordinator", Role.COORDINATOR, "sslserver"),
        ("hospital-a", Role.SITE, "sslclient"),
        ("ops", Role.OPERATOR, "sslclient"),
        ("asked-by-itself", Role.COORDINATOR, "sslclient"),
    ]:
        files = issue(authority, name, role=role)
        command = [openssl, "verify", "-x509_strict", "-check_ss_sig", "-purpose", purpose, "-CAfile"]
        verified = subprocess.run([*command, str(files.ca), str(files.cert)], capture_output=True, text=True)
        assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.parametrize(
    ("role", "purposes", "urn"),
    [
        (Role.SITE, _CLIENT, "urn:fedhds:site:a.b_c-1"),
        (Role.OPERATOR, _CLIENT, "urn:fedhds:operator:a.b_c-1"),
        (Role.COORDINATOR, [ExtendedKeyUsageOID.SERVER_AUTH, *_CLIENT], "urn:fedhds:coordinator:a.b_c-1"),
    ],
)
def test_a_leaf_states_name_role_and_purpose(
    authority: Path, role: Role, purposes: list[x509.ObjectIdentifier], urn: str
) -> None:
    certificate = issue(authority, "a.b_c-1", role=role).cert
    assert certificate.name == "a.b_c-1.crt"
    assert _names(certificate).get_values_for_type(x509.UniformResourceIdentifier) == [urn]
    assert _load(certificate).subject.rfc4514_string() == "CN=a.b_c-1"
    stated = _load(certificate).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(stated) == purposes


def test_a_leaf_cannot_sign_and_the_authority_signs_only_leaves(authority: Path) -> None:
    leaf = _load(issue(authority, "hospital-a", role=Role.SITE).cert).extensions
    root = _load(authority / "ca.crt").extensions
    assert leaf.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
    assert root.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert not leaf.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_a_coordinator_names_its_hosts(authority: Path) -> None:
    names = _names(issue(authority, "c", role=Role.COORDINATOR, hosts=["fed.example.org", "10.0.0.7"]).cert)
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]


def test_a_coordinator_without_hosts_names_this_machine(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-box")
    names = _names(issue(authority, "c", role=Role.COORDINATOR).cert)
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "gpu-box"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def test_a_machine_name_that_no_certificate_can_carry_is_left_out(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Eve's laptop")
    names = _names(issue(authority, "c", role=Role.COORDINATOR).cert)
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


@pytest.mark.parametrize("host", ["https://fed.example.org", "fed.example.org:50051", "a b", "", "münchen.de", "-a"])
def test_a_malformed_host_is_refused(authority: Path, host: str) -> None:
    with pytest.raises(UsageError, match="--host"):
        issue(authority, "c", role=Role.COORDINATOR, hosts=[host])


def test_hosts_are_for_coordinators(authority: Path) -> None:
    with pytest.raises(UsageError, match="nobody dials a site"):
        issue(authority, "hospital-a", role=Role.SITE, hosts=["localhost"])


@pytest.mark.parametrize("name", ["", "a/b", "a b", "../ca", "ä", "x" * 65, "a\n", "urn:x", "ca", "CA"])
def test_a_name_that_cannot_stand_in_a_urn_or_a_folder_is_refused(authority: Path, name: str) -> None:
    before = sorted(authority.iterdir())
    with pytest.raises(UsageError, match="name"):
        issue(authority, name, role=Role.SITE)
    assert sorted(authority.iterdir()) == before


def test_the_longest_name_fits(authority: Path) -> None:
    assert issue(authority, "x" * 64, role=Role.SITE).cert.exists()


def test_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = init_authority(tmp_path / "certs").parent
        files = issue(folder, "hospital-a", role=Role.SITE, out=tmp_path / "out")
    finally:
        os.umask(old)
    assert _mode(folder) == _mode(tmp_path / "out") == 0o700
    assert _mode(folder / "ca.key") == _mode(files.key) == 0o600


def test_the_folder_holds_the_finished_files_and_nothing_else(authority: Path) -> None:
    issue(authority, "hospital-a", role=Role.SITE)
    issue(authority, "hospital-a", role=Role.SITE, renew=True)
    assert {path.name for path in authority.iterdir()} == {"ca.crt", "ca.key", "hospital-a.crt", "hospital-a.key"}


def test_out_holds_all_that_a_site_needs_and_not_the_authority_key(authority: Path, tmp_path: Path) -> None:
    files = issue(authority, "hospital-a", role=Role.SITE, out=tmp_path / "parcel")
    assert {path.name for path in (tmp_path / "parcel").iterdir()} == {"ca.crt", "hospital-a.crt", "hospital-a.key"}
    assert files.ca.read_bytes() == (authority / "ca.crt").read_bytes()


def test_out_of_another_authority_is_refused(authority: Path, tmp_path: Path) -> None:
    other = init_authority(tmp_path / "other").parent
    with pytest.raises(UsageError, match="another authority"):
        issue(authority, "hospital-a", role=Role.SITE, out=other)
    assert not (other / "hospital-a.key").exists()


@pytest.mark.parametrize("left", ["ca.crt", "ca.key"])
def test_an_authority_is_never_overwritten(authority: Path, left: str) -> None:
    (authority / ({"ca.crt", "ca.key"} - {left}).pop()).unlink()
    before = (authority / left).read_bytes()
    with pytest.raises(UsageError, match="exists already: issue certificates from it"):
        init_authority(authority)
    assert (authority / left).read_bytes() == before


def test_a_name_is_not_issued_twice(authority: Path) -> None:
    files = issue(authority, "hospital-a", role=Role.SITE)
    before = files.cert.read_bytes(), files.key.read_bytes()
    with pytest.raises(UsageError, match="--renew"):
        issue(authority, "hospital-a", role=Role.SITE)
    assert (files.cert.read_bytes(), files.key.read_bytes()) == before


def test_renewal_keeps_the_key_and_moves_the_dates(authority: Path) -> None:
    first = issue(authority, "hospital-a", role=Role.SITE, days=5)
    key, ends = first.key.read_bytes(), expiry(first.cert)
    second = issue(authority, "hospital-a", role=Role.SITE, days=50, renew=True)
    assert second == first
    assert second.key.read_bytes() == key
    assert expiry(second.cert) - ends >= timedelta(days=45)


def test_renewal_keeps_a_coordinators_hosts_and_adds_new_ones(authority: Path) -> None:
    issue(authority, "c", role=Role.COORDINATOR, hosts=["one.example", "::1"])
    files = issue(authority, "c", role=Role.COORDINATOR, hosts=["two.example", "one.example"], renew=True)
    names = _names(files.cert)
    assert names.get_values_for_type(x509.DNSName) == ["one.example", "two.example"]
    assert len(names.get_values_for_type(x509.IPAddress)) == 1


def test_renewal_without_the_old_certificate_needs_only_the_key(authority: Path) -> None:
    files = issue(authority, "c", role=Role.COORDINATOR, hosts=["one.example"])
    key = files.key.read_bytes()
    files.cert.unlink()
    issue(authority, "c", role=Role.COORDINATOR, hosts=["two.example"], renew=True)
    assert _names(files.cert).get_values_for_type(x509.DNSName) == ["two.example"]
    assert files.key.read_bytes() == key


def test_renewal_refuses_another_role_a_missing_key_and_a_foreign_key(authority: Path) -> None:
    with pytest.raises(UsageError, match="nothing to renew"):
        issue(authority, "a", role=Role.SITE, renew=True)
    a = issue(authority, "a", role=Role.SITE)
    with pytest.raises(UsageError, match="renewing keeps name and role"):
        issue(authority, "a", role=Role.OPERATOR, renew=True)
    a.key.write_bytes(issue(authority, "b", role=Role.SITE).key.read_bytes())
    with pytest.raises(UsageError, match="does not belong to the key"):
        issue(authority, "a", role=Role.SITE, renew=True)


def test_validity_starts_an_hour_ago_and_ends_with_the_authority(tmp_path: Path) -> None:
    folder = init_authority(tmp_path, days=10).parent
    leaf, root = _load(issue(folder, "a", role=Role.SITE, days=825).cert), _load(folder / "ca.crt")
    assert leaf.not_valid_after_utc == root.not_valid_after_utc
    for certificate in (leaf, root):
        age = datetime.now(UTC) - certificate.not_valid_before_utc
        assert timedelta(hours=1) <= age < timedelta(hours=1, minutes=5)


@pytest.mark.parametrize("days", [0, -1, 36_501])
def test_days_out_of_range_are_refused(authority: Path, tmp_path: Path, days: int) -> None:
    with pytest.raises(UsageError, match="--days"):
        init_authority(tmp_path / "new", days=days)
    with pytest.raises(UsageError, match="--days"):
        issue(authority, "a", role=Role.SITE, days=days)


def test_an_expired_authority_issues_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = datetime.now(UTC) - timedelta(days=9), datetime.now(UTC) - timedelta(days=1)
    with monkeypatch.context() as patch:
        patch.setattr(pki, "_validity", lambda days: past)
        folder = init_authority(tmp_path).parent
    with pytest.raises(UsageError, match="expired on"):
        issue(folder, "a", role=Role.SITE)


def test_a_missing_or_broken_authority_is_explained(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fedhds certs init"):
        issue(tmp_path / "nowhere", "a", role=Role.SITE)
    other = init_authority(tmp_path / "other").parent
    (authority / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(UsageError, match="does not belong to"):
        issue(authority, "a", role=Role.SITE)
    (authority / "ca.key").write_text("no key")
    with pytest.raises(UsageError, match="not an unencrypted PEM key"):
        issue(authority, "a", role=Role.SITE)
    (authority / "ca.crt").write_text("no certificate")
    with pytest.raises(UsageError, match="not a PEM certificate"):
        issue(authority, "a", role=Role.SITE)


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        init_authority(tmp_path / "file" / "certs")


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_an_authority_name_of_a_wrong_length_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="1 to 64"):
        init_authority(tmp_path / "certs", name=name)


def test_pythons_strict_context_loads_the_authority(authority: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(authority / "ca.crt")
    assert context.cert_store_stats()["x509_ca"] == 1
