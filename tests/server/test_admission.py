"""The operator's lists: names, keys, serial numbers, revocation lists; read again when they change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedhds.errors import SettingsError, UsageError
from fedhds.security.identity import PeerIdentity, Role, identity_from_certificate
from fedhds.security.pki import init_authority, issue, revoke
from fedhds_server.coordinator.admission import Admission, SiteList

KEY, SERIAL = "ab" * 32, "7f3e"


def put(path: Path, content: str | bytes) -> None:
    """Replaces a file; the inode tells, however coarse the disk's clock is."""
    new = path.with_suffix(".new")
    new.write_bytes(content if isinstance(content, bytes) else content.encode())
    new.replace(path)


@pytest.mark.parametrize(
    "line", ["hospital-a", KEY, KEY.upper(), ":".join(["AB"] * 32), SERIAL, "7F:3E", "hospital-a  # withdrew"]
)
def test_a_line_names_a_party_a_key_or_a_certificate(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list"
    put(path, f"# comment\n\n{line}\nsomebody\n")
    known = SiteList("--revoked", path)
    assert known.includes("hospital-a", KEY, SERIAL)
    assert known.includes("hospital-a/ward-1", KEY, SERIAL)
    assert not known.includes("hospital-b", "cd" * 32, "1")
    assert not known.includes("b", "", ""), "nothing of a site without TLS matches by accident"


def test_a_list_is_read_again_and_a_broken_one_changes_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "list"
    put(path, "a\n")
    admission = Admission(allowed=SiteList("--allow-sites", path, may_be_empty=False))
    version = admission.version
    admission.refresh()
    assert (admission.version, admission.warnings) == (version, [])
    assert "'b' is not on the list of sites" in admission.refusal("b", "", "")
    for broken in (b"\xff\xfe", b"", b"a/b\n", b"# nobody\n"):
        put(path, broken)
        admission.refresh()
        assert (admission.version, admission.refusal("a", "", "")) == (version, "")
        assert "--allow-sites: cannot use" in admission.warnings[0]
        assert "the version before is still in force" in admission.warnings[0]
    path.unlink()
    admission.refresh()
    assert "No such file" in admission.warnings[0]
    assert "cannot use" in caplog.text
    put(path, "b\n")
    admission.refresh()
    assert (admission.version, admission.warnings) == (version + 1, [])
    assert admission.refusal("b", "", "") == ""
    assert admission.refusal("a", "", "")


def test_a_list_that_cannot_be_read_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--revoked: cannot use .*nothing"):
        SiteList("--revoked", tmp_path / "nothing")


def test_a_revocation_list_names_certificates_and_is_the_authoritys(tmp_path: Path) -> None:
    ca = init_authority(tmp_path / "ca").parent
    files = {name: issue(ca, name, role=Role.SITE) for name in ("a", "b")}
    peers: dict[str, PeerIdentity] = {n: identity_from_certificate(f.cert.read_bytes()) for n, f in files.items()}
    path = revoke(ca, files["a"].cert)
    known = SiteList("--revoked", path, authority=files["a"].ca)

    def listed(name: str) -> bool:
        return known.includes(name, peers[name].key_fingerprint, peers[name].serial)

    assert (listed("a"), listed("b"), known.problem) == (True, False, "")
    revoke(ca, files["a"].cert)
    revoke(ca, files["b"].cert)
    known.refresh()
    assert (listed("a"), listed("b")) == (True, True)
    # A list of somebody else's making.
    other = init_authority(tmp_path / "other").parent
    theirs = revoke(other, issue(other, "a", role=Role.SITE).cert)
    put(path, theirs.read_bytes())
    known.refresh()
    assert "is not signed by the authority" in known.problem
    assert (listed("a"), listed("b")) == (True, True)
    with pytest.raises(SettingsError, match="needs --tls-ca"):
        SiteList("--revoked", theirs)
    with pytest.raises(UsageError, match="not a certificate of the authority"):
        revoke(other, files["a"].cert)


def test_a_file_that_only_gets_another_time_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "list"
    put(path, "a\n")
    known = SiteList("--revoked", path)
    os.utime(path, (1, 1))
    assert not known.refresh()
