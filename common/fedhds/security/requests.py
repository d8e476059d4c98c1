"""Certificate signing requests: a private key is made where it is used, and never leaves that host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fedhds.errors import UsageError
from fedhds.security import pki
from fedhds.security.identity import URN_PREFIX, Role, check_name

_CURVES = ("secp256r1", "secp384r1")
_MIN_RSA_BITS = 2048


def make_request(folder: Path, name: str, *, role: Role, hosts: Sequence[str] = ()) -> tuple[Path, Path]:
    """Makes `NAME.key`, or takes the one that is there, and `NAME.csr` for it in `folder`; returns (csr, key).

    The request names role and name, and the hosts of a coordinator. Raises UsageError as `pki.issue`.
    """
    pki.check_leaf(name, role, hosts)
    _, key_path = pki.paths(folder, name)
    pki.make_private_folder(folder)
    if key_path.exists():
        key = pki.load_key(key_path)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        pki.write_key(key_path, key)
    names = pki.subject_names(name, role, [pki.general_name(host) for host in hosts])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    path = folder / f"{name}.csr"
    pki.write(path, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path, key_path


def sign_request(
    folder: Path,
    request_path: Path,
    name: str,
    *,
    role: Role,
    hosts: Sequence[str] = (),
    days: int = 825,
    out: Path | None = None,
    renew: bool = False,
) -> Path:
    """Signs the key of a request as `NAME.crt` in `out` (default `folder`) for `role` and `name`; returns its path.

    What the operator says counts: the request must be signed by its own key, name the same, and ask for no host beyond
    `hosts`. With `renew` an earlier certificate of the same key is replaced. Raises UsageError.
    """
    pki.check_leaf(name, role, hosts)
    request = _checked(request_path, name, role)
    key = request.public_key()
    asked = _hosts_of(request)
    allowed = [pki.general_name(host) for host in hosts]
    if beyond := [str(host.value) for host in asked if host not in allowed]:
        raise UsageError(
            f"{request_path} asks for the host {beyond[0]}, which --host does not name; add --host {beyond[0]} if the "
            "coordinator is to be reached by it"
        )
    if role is Role.COORDINATOR and not allowed:
        raise UsageError("--host is missing: name the hosts by which sites reach the coordinator of this request")
    out = folder if out is None else out
    certificate_path, _ = pki.paths(out, name)
    if certificate_path.exists():
        earlier = pki.load_certificate(certificate_path)
        if not renew:
            raise UsageError(f"{certificate_path} exists already: add --renew for a new certificate of the same key")
        if earlier.public_key() != key:
            raise UsageError(
                f"{certificate_path} is for another key, and a name has one key in a run; issue another name, or move "
                "that certificate away"
            )
    return pki.sign(folder, key, name, role=role, hosts=allowed, days=days, out=out)


def _checked(path: Path, name: str, role: Role) -> Any:
    """The request in a file, when it is what the operator thinks it is."""
    try:
        request = x509.load_pem_x509_csr(pki.read(path))
        sound = request.is_signature_valid
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no certificate signing request in PEM: {error}") from error
    if not sound:
        raise UsageError(f"{path} is not signed by its own key: it was changed on its way; have it sent again")
    curve = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    if not curve and not (isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS):
        raise UsageError(
            f"{path} has a key that gRPC does not take; make it with `fedhds certs request`, which uses {_CURVES[0]}"
        )
    names = [attribute.value for attribute in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    urns = [str(uri.value) for uri in _names_of(request) if isinstance(uri, x509.UniformResourceIdentifier)]
    if names != [check_name(name)] or (urns and urns != [f"{URN_PREFIX}{role}:{name}"]):
        whose = urns[0].removeprefix(URN_PREFIX) if urns else ", ".join(map(str, names)) or "nobody"
        raise UsageError(f"{path} is a request of {whose!r}, not of the {role} {name}; ask who sent it")
    return request


def _names_of(request: Any) -> list[x509.GeneralName]:
    try:
        return list(request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise UsageError(f"the request's extensions cannot be read: {error}") from error


def _hosts_of(request: Any) -> list[Any]:
    return [name for name in _names_of(request) if isinstance(name, x509.DNSName | x509.IPAddress)]
