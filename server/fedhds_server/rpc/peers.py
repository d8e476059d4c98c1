"""Who calls: what sessions are bound to, and what limits are counted by."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from urllib.parse import unquote

import grpc

from fedhds.errors import EnrollmentRefused
from fedhds.security.identity import PeerIdentity, identity_from_certificate, identity_of


def key_of(context: grpc.aio.ServicerContext) -> str:
    """Fingerprint of the caller's key, 64 hexadecimal digits; empty without TLS. Raises EnrollmentRefused."""
    peer = _identity(context)
    return peer.key_fingerprint if peer else ""


def peer_of(context: grpc.aio.ServicerContext) -> str:
    """The certificate's key or, where there is none of this federation, the address that the caller has."""
    try:
        return key_of(context) or host_of(context)
    except EnrollmentRefused:
        return host_of(context)


def host_of(context: grpc.aio.ServicerContext) -> str:
    """The caller's host; gRPC names a peer "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711"."""
    return unquote(context.peer()).partition(":")[2].rpartition(":")[0]


def _identity(context: grpc.aio.ServicerContext) -> PeerIdentity | None:
    caller = _CALLER.get()
    if caller is None or caller[0] is not context:
        known = context.auth_context()
        certificates = known.get("x509_pem_cert")
        # Reading a certificate takes longer than all else that a call needs.
        caller = context, _of_certificate(certificates[0]) if certificates else identity_of(known)
        _CALLER.set(caller)
    return caller[1]


# The call that the current task answers, and who makes it: gRPC takes 20 µs to say so.
_CALLER: ContextVar[tuple[grpc.aio.ServicerContext, PeerIdentity | None] | None] = ContextVar("caller", default=None)
_of_certificate = functools.lru_cache(maxsize=4096)(identity_from_certificate)
