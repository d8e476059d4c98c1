"""The TLS files that a process is started with, checked before use, and gRPC credentials made of them.

`diagnose_handshake` is here because grpcio tells a client UNAVAILABLE and nothing more, whatever failed.
`grpc` and `cryptography` are imported where they are used, for the command line's `--help` reads this file.
"""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import EnrollmentRefused, SettingsError
from fedhds.runtime.proxies import bypass, proxy_to
from fedhds.security.certificates import (
    ISSUER_KEYS,
    OWN_KEYS,
    chains,
    check_dates,
    check_public_key,
    load_certificates,
    read,
)
from fedhds.security.identity import PeerIdentity, Role, identity_from_certificate
from fedhds.security.renewal import Renewal

if TYPE_CHECKING:
    import grpc

# HTTP/2's connection preface and an empty SETTINGS frame: what every gRPC client says first (RFC 9113, 3.4).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_FRAME_TYPE = 3
_SETTINGS_FRAME = 4
_ADDRESS = re.compile(
    r"(?:dns:(?://[^/]*/)?|ipv4:|ipv6:)?(?:\[(?P<v6>[^][/]+)\]|(?P<host>[^:/]+|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*))(?::(?P<port>\d+))?"
)
_DEFAULT_PORT, _HIGHEST_PORT = 443, 65_535
# OpenSSL's X509_V_ERR_* numbers, which Python's ssl names nowhere.
_NOT_YET_VALID, _EXPIRED, _WRONG_PURPOSE, _WRONG_HOST = {9}, {10}, {26}, {62, 64}


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one end of a mutual TLS connection."""

    ca: Path
    """The authority's certificate (or several), by which the other end is judged."""
    cert: Path
    """This end's certificate, followed by any intermediate ones."""
    key: Path
    """The private key of `cert`, unencrypted."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All three."""
        return self.ca, self.cert, self.key

    @classmethod
    def from_settings(cls, ca: Path | None, cert: Path | None, key: Path | None) -> TlsFiles | None:
        """The files behind `--tls-ca`, `--tls-cert` and `--tls-key`; None if no flag is given.

        Raises SettingsError, naming the flag at fault, if a flag is missing, a file cannot be read, or the
        certificate is expired, not yet valid, without a fedhds identity, not of this key or not of this CA.
        """
        flags = {"--tls-ca": ca, "--tls-cert": cert, "--tls-key": key}
        missing = [flag for flag, path in flags.items() if path is None]
        if len(missing) == len(flags):
            return None
        if ca is None or cert is None or key is None:
            raise SettingsError(missing[0], "is missing; --tls-ca, --tls-cert and --tls-key go together")
        files = cls(ca, cert, key)
        files.check()
        return files

    def check(self) -> None:
        """Raises SettingsError if the files cannot serve now; a certificate may expire in a long run."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        authorities = load_certificates("--tls-ca", self.ca)
        leaf, *intermediates = load_certificates("--tls-cert", self.cert)
        check_public_key("--tls-cert", self.cert, leaf, OWN_KEYS)
        for flag, path, issuers in (
            ("--tls-cert", self.cert, intermediates),
            ("--tls-ca", self.ca, authorities),
        ):
            for issuer in issuers:
                check_public_key(flag, path, issuer, ISSUER_KEYS)
        try:
            key = load_pem_private_key(read("--tls-key", self.key), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SettingsError("--tls-key", f"{self.key} is not an unencrypted PEM key: {error}") from error
        if key.public_key() != leaf.public_key():
            raise SettingsError(
                "--tls-key", f"{self.key} does not belong to the certificate {self.cert}; name the pair's own key"
            )
        if not chains(leaf, intermediates, authorities):
            raise SettingsError(
                "--tls-cert",
                f"{self.cert} is not signed by the authority in {self.ca}; "
                "take certificate and ca.crt from the same `fedhds certs issue`",
            )
        # First, as a certificate ends with its authority, and cannot be renewed then.
        if all(authority.not_valid_after_utc <= datetime.now(UTC) for authority in authorities):
            remedy = "make a new authority with `fedhds certs init` and issue every certificate again"
            check_dates("--tls-ca", self.ca, authorities[0], remedy)
        check_dates("--tls-cert", self.cert, leaf, "have a new one issued with `fedhds certs issue ... --renew`")
        try:
            identity_from_certificate(self.cert.read_bytes())
        except EnrollmentRefused as error:
            raise SettingsError("--tls-cert", f"{self.cert}: {error}") from error


def own_identity(files: TlsFiles) -> PeerIdentity:
    """Who this process is. Raises EnrollmentRefused for a certificate without a fedhds identity."""
    return identity_from_certificate(files.cert.read_bytes())


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that admit only peers with a certificate of `files.ca`; renewed files count from the next handshake.

    Raises SettingsError for files that cannot serve, and for a certificate that is not a coordinator's.
    """
    import grpc

    def configuration() -> grpc.ServerCertificateConfiguration:
        files.check()
        identity = own_identity(files)
        if identity.role is not Role.COORDINATOR:
            raise SettingsError(
                "--tls-cert",
                f"{files.cert} is for the {identity.role} {identity.name}; "
                "a coordinator needs one issued with --role coordinator",
            )
        pair = (files.key.read_bytes(), files.cert.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=files.ca.read_bytes())

    renewal = Renewal(files.paths)
    return grpc.dynamic_ssl_server_credentials(
        configuration(), lambda: renewal.load(configuration), require_client_authentication=True
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials that trust `files.ca` alone and show `files.cert`.

    Raises SettingsError for a coordinator's certificate, which the coordinator would refuse from a client.
    """
    identity = own_identity(files)
    if identity.role is Role.COORDINATOR:
        raise SettingsError(
            "--tls-cert",
            f"{files.cert} is for the coordinator {identity.name}; "
            "a client needs one issued with --role site or --role operator",
        )
    return probe_credentials(files)


def probe_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """The same for a caller that only asks how a coordinator is, which another coordinator may do, too."""
    import grpc

    return grpc.ssl_channel_credentials(
        root_certificates=files.ca.read_bytes(),
        private_key=files.key.read_bytes(),
        certificate_chain=files.cert.read_bytes(),
    )


def diagnose_handshake(target: str, files: TlsFiles | None, timeout_s: float = 5.0) -> str | None:
    """Why no gRPC connection to `target` comes about, with what to do; None if nothing is wrong.

    Dials `target` once or twice, with `timeout_s` for the connection and for every answer;
    it blocks, so call it from a thread. `target` is HOST:PORT as given to gRPC, a resolver's prefix
    allowed; None for Unix sockets, which it cannot judge. Does not raise for what it finds.
    """
    if target.startswith(("unix:", "unix-abstract:", "vsock:")):
        return None
    parted = _ADDRESS.fullmatch(target)
    if parted is None or int(parted["port"] or 0) > _HIGHEST_PORT:
        return f"the address {target} is not of the form HOST:PORT; write it without a scheme or a path"
    host, port = parted["v6"] or parted["host"], int(parted["port"] or _DEFAULT_PORT)
    if files is not None:
        try:
            files.check()
        except SettingsError as error:
            return str(error)
    try:
        answers = _speaks_http2(host, port, timeout_s)
        if files is None:
            return _diagnose_without_tls(host, port, timeout_s, answers_plain=answers)
        if answers:
            return (
                f"the server at {host}:{port} does not speak TLS; "
                "drop --tls-ca, --tls-cert and --tls-key, or start the coordinator with them"
            )
        return _diagnose_tls(host, port, files, timeout_s)
    except (OSError, UnicodeError) as error:
        return _diagnose_connection(host, port, error, timeout_s)


def diagnose_failure(target: str, files: TlsFiles | None, details: str, timeout_s: float = 5.0) -> str | None:
    """The same after a call to `target` ended with gRPC's `details`: then a proxy may have been in its way."""
    if reason := diagnose_handshake(target, files, timeout_s):
        return reason
    parted = _ADDRESS.fullmatch(target)
    host = (parted["v6"] or parted["host"]) if parted else ""
    if not host or not (proxy := proxy_to(host)):
        return None
    return (
        f"{target} answers directly, but gRPC uses the proxy in ${proxy[0]} ({proxy[1]}), where it failed ({details}); "
        f"{bypass(host)}"
    )


def _diagnose_connection(host: str, port: int, error: Exception, timeout_s: float) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        reason = f"the host name {host} cannot be resolved; check its spelling and this machine's DNS"
    elif isinstance(error, ConnectionRefusedError):
        reason = f"nothing listens on {host}:{port}; check the port and that the coordinator is running"
    elif isinstance(error, TimeoutError):
        reason = f"{host}:{port} does not answer within {timeout_s:g} s; check the address and the firewalls"
    else:
        reason = f"{host}:{port} cannot be reached: {error}"
    if proxy := proxy_to(host):
        reason += f" (tried directly; gRPC itself uses the proxy in ${proxy[0]} unless $no_proxy names the host)"
    return reason


def _diagnose_without_tls(host: str, port: int, timeout_s: float, *, answers_plain: bool) -> str | None:
    if answers_plain:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # Nothing is sent or believed over this connection: it only tells whether the server speaks TLS.
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            speaks_tls = True
    except ssl.SSLError as error:
        speaks_tls = _is_alert(error)
    except ConnectionError:
        speaks_tls = False
    if speaks_tls:
        return (
            f"the server at {host}:{port} speaks TLS, but no --tls-* flags were given; "
            "add --tls-ca, --tls-cert and --tls-key"
        )
    return _not_grpc(host, port)


def _diagnose_tls(host: str, port: int, files: TlsFiles, timeout_s: float) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, port), timeout_s) as plain:
        try:
            secure = context.wrap_socket(plain, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            return _refuse_server(host, files, error)
        except ssl.SSLError as error:
            return _refused(host, port, files, str(error.reason)) if _is_alert(error) else _not_grpc(host, port)
        except ConnectionError:
            return _not_grpc(host, port)
    with secure:
        # In TLS 1.3 the server judges our certificate after our handshake is over: only an answer tells.
        try:
            secure.sendall(_PREFACE)
            answer = _receive(secure, _FRAME_TYPE + 1)
        except ssl.SSLError as error:
            return _refused(host, port, files, str(error.reason))
        except ConnectionError:
            answer = b""
        if not answer:
            return _refused(host, port, files, "it closed the connection")
    return None if answer[_FRAME_TYPE:] == bytes([_SETTINGS_FRAME]) else _not_grpc(host, port)


def _refuse_server(host: str, files: TlsFiles, error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code in _WRONG_HOST:
        return (
            f"the coordinator's certificate does not name the host {host}; reissue it with "
            f"`fedhds certs issue ... --renew --host {host}`, or dial a name that it has"
        )
    if code in _EXPIRED:
        return "the coordinator's certificate has expired; reissue it with `fedhds certs issue ... --renew`"
    if code in _NOT_YET_VALID:
        return "the coordinator's certificate is not valid yet; check the clocks of both machines"
    if code in _WRONG_PURPOSE:
        return "the server's certificate is not a coordinator's; reissue it with --role coordinator"
    return (
        f"the coordinator's certificate is not from the authority in {files.ca} ({error.verify_message}); "
        "take ca.crt from the person who issues this federation's certificates"
    )


def _refused(host: str, port: int, files: TlsFiles, reason: str) -> str:
    return (
        f"your certificate {files.cert} was refused by {host}:{port} ({reason.lower().replace('_', ' ')}); "
        "have it issued with --role site or operator by the authority that the coordinator trusts"
    )


def _not_grpc(host: str, port: int) -> str:
    return f"{host}:{port} answers, but not as a coordinator; check the port, which may be its status page's"


def _speaks_http2(host: str, port: int, timeout_s: float) -> bool:
    """Whether the server answers HTTP/2 in the clear."""
    with socket.create_connection((host, port), timeout_s) as plain:
        try:
            plain.sendall(_PREFACE)
            answer = _receive(plain, _FRAME_TYPE + 1)
        except (ConnectionError, TimeoutError):
            return False
    return answer[_FRAME_TYPE:] == bytes([_SETTINGS_FRAME])


def _is_alert(error: ssl.SSLError) -> bool:
    """Whether the other end sent a TLS alert, which only something that speaks TLS does."""
    return "ALERT" in (error.reason or "")


def _receive(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer if the other end closes before."""
    received = b""
    while len(received) < size and (more := connection.recv(size - len(received))):
        received += more
    return received
