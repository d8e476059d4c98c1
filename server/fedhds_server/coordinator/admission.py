"""Whom the operator lets in: lists in files that are read again when they change, and limits for each certificate."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from fedhds.errors import SettingsError
from fedhds_server.run.membership import DEFAULT_LIMITS, Limits
from fedhds_server.run.parties import party_of
from fedhds_server.settings import ServerSettings

logger = logging.getLogger(__name__)

_CRL = b"-----BEGIN X509 CRL-----"
_MAX_BYTES = 16 << 20


class SiteList:
    """One file: a line for each name, fingerprint of a key or serial number; or a revocation list in PEM.

    A version of the file that cannot be read changes nothing: the one before stays in force, and `problem` says why.
    """

    def __init__(self, setting: str, path: Path, *, authority: Path | None = None, may_be_empty: bool = True) -> None:
        self._setting, self._path = setting, path
        self._authority, self._may_be_empty = authority, may_be_empty
        self._entries: frozenset[str] = frozenset()
        self._expires: datetime | None = None
        self._version: tuple[int, ...] | None = None
        self._error = ""
        self.refresh()
        if self._error:
            raise SettingsError(setting, self._error)

    @property
    def problem(self) -> str:
        """What the operator should fix; empty when all is well."""
        if self._error:
            return f"{self._setting}: {self._error}; the version before is still in force"
        if self._expires and self._expires < datetime.now(UTC):
            return (
                f"{self._setting}: {self._path} expired on {self._expires:%Y-%m-%d}; it stays in force, put a newer one"
            )
        return ""

    def includes(self, site: str, key: str, serial: str) -> bool:
        """Whether a line names the site's party, its key or its certificate."""
        return not self._entries.isdisjoint({party_of(site), key, serial} - {""})

    def refresh(self) -> bool:
        """Reads the file again if it has changed; whether what it says has."""
        try:
            stat = self._path.stat()
            version = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if version == self._version:
                return False
            self._version = version
            if stat.st_size > _MAX_BYTES:
                raise ValueError(f"it is longer than {_MAX_BYTES >> 20} MiB")
            entries, expires = self._parsed(self._path.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            message = f"cannot use {self._path}: {reason}"
            if message != self._error:
                self._error = message
                logger.error("%s: %s", self._setting, message)
            if isinstance(error, OSError):
                self._version = None
            return False
        changed = entries != self._entries
        self._entries, self._expires, self._error = entries, expires, ""
        logger.info("%s: %s has %d entries", self._setting, self._path, len(entries))
        return changed

    def _parsed(self, content: bytes) -> tuple[frozenset[str], datetime | None]:
        if _CRL in content:
            return self._revocations(content)
        lines = [line.partition("#")[0].strip() for line in content.decode("utf-8").splitlines()]
        entries = [line for line in lines if line]
        if not entries and not self._may_be_empty:
            raise ValueError("it names nobody")
        if broken := next((line for line in entries if "/" in line or not line.isprintable()), None):
            raise ValueError(
                f"{broken[:80]!r} is no name of a certificate, no fingerprint of a key and no serial number"
            )
        # As openssl prints fingerprints and serial numbers, too.
        return frozenset(entries) | {entry.lower().replace(":", "") for entry in entries}, None

    def _revocations(self, content: bytes) -> tuple[frozenset[str], datetime | None]:
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm

        if self._authority is None:
            raise ValueError("it is a certificate revocation list, which needs --tls-ca to be checked with")
        try:
            revoked = x509.load_pem_x509_crl(content)
            authorities = x509.load_pem_x509_certificates(self._authority.read_bytes())
            signed = any(
                authority.subject == revoked.issuer and revoked.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
                for authority in authorities
            )
        except (TypeError, UnsupportedAlgorithm) as error:
            raise ValueError(str(error)) from error
        if not signed:
            raise ValueError(f"it is not signed by the authority in {self._authority}")
        return frozenset(f"{entry.serial_number:x}" for entry in revoked), revoked.next_update_utc


class Admission:
    """What decides besides the run's state who takes part."""

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        *,
        allowed: SiteList | None = None,
        revoked: SiteList | None = None,
        evaluators: SiteList | None = None,
    ) -> None:
        self.limits = limits
        """Of each certificate."""
        self.version = 0
        """Goes up when a list says something else."""
        self._allowed, self._revoked, self._evaluators = allowed, revoked, evaluators

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """As the settings say; raises SettingsError for a list that cannot be read."""
        allow, revoked, evaluators = settings.allow_sites, settings.revoked, settings.evaluators
        return cls(
            Limits(max_shards=settings.max_shards, max_rows=settings.max_rows_per_site),
            allowed=SiteList("--allow-sites", allow, may_be_empty=False) if allow else None,
            revoked=SiteList("--revoked", revoked, authority=settings.tls_ca) if revoked else None,
            evaluators=SiteList("--evaluators", evaluators) if evaluators else None,
        )

    @property
    def warnings(self) -> list[str]:
        """What the operator should fix."""
        return [known.problem for known in self._lists if known.problem]

    def refresh(self) -> None:
        """Reads again what has changed."""
        self.version += sum(known.refresh() for known in self._lists)

    def refusal(self, site: str, key: str, serial: str) -> str:
        """Why the lists do not let a site in; empty when they do."""
        if self.is_revoked(site, key, serial):
            return f"the certificate of {party_of(site)!r} is revoked; ask the operator of the coordinator"
        if self._allowed is not None and not self._allowed.includes(site, key, serial):
            return f"{party_of(site)!r} is not on the list of sites of this run; ask the operator of the coordinator"
        return ""

    def is_revoked(self, name: str, key: str, serial: str) -> bool:
        """Whether a certificate no longer counts."""
        return self._revoked is not None and self._revoked.includes(name, key, serial)

    def may_evaluate(self, site: str, key: str, serial: str) -> bool:
        """Whether a site's evaluations count."""
        return self._evaluators is None or self._evaluators.includes(site, key, serial)

    @property
    def _lists(self) -> list[SiteList]:
        return [known for known in (self._allowed, self._revoked, self._evaluators) if known is not None]
