"""HOST:PORT addresses in settings."""

from __future__ import annotations

import ipaddress
import re

_MAX_PORT = 65_535
# A resolver of gRPC's may stand before the host of a coordinator: dns:///HOST:PORT.
_ADDRESS = re.compile(
    r"(?P<host>(?:dns:(?://[^/\s]*/)?|ipv4:|ipv6:)?(?:\[[0-9A-Fa-f:.]+(?:%[^]\s/]+)?\]|[^][:/\s]+)):(?P<port>[0-9]+)"
)


def addresses(server: str) -> list[str]:
    """Every HOST:PORT of a `--server`; raises ValueError as `host_and_port` does, and for port 0."""
    listed = [address.strip() for address in server.split(",")]
    for address in listed:
        if not host_and_port(address)[1]:
            raise ValueError(f"{address!r}: nothing can be reached at port 0; give the coordinator's")
    return listed


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of HOST:PORT, the host with its brackets; raises ValueError that says how to write it."""
    parts = _ADDRESS.fullmatch(address)
    if parts and int(parts["port"]) <= _MAX_PORT:
        return parts["host"], int(parts["port"])
    if scheme := re.match(r"[a-z+]+://", address):
        raise ValueError(f"{address!r} is not HOST:PORT; write it without {scheme[0]} and without a path")
    if bracketed := _with_brackets(address):
        raise ValueError(f"{address!r} is not HOST:PORT; an IPv6 address needs brackets and a port: {bracketed}")
    raise ValueError(f"{address!r} is not HOST:PORT")


def is_loopback(host: str) -> bool:
    """Whether connections to `host` stay on this machine; a name other than localhost counts as outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_http(address: str, insecure: bool) -> None:
    """Raises ValueError when a `--http` is malformed, or open to other machines without `--insecure`."""
    if not address:
        return
    try:
        host, _ = host_and_port(address)
    except ValueError as error:
        raise ValueError(f"http: {error}") from None
    if not is_loopback(host) and not insecure:
        raise ValueError(
            f"http: {host} is reachable from other machines, and everybody there could read what is served; listen on "
            "127.0.0.1, or add --insecure if a firewall decides who gets there"
        )


def _with_brackets(address: str) -> str:
    """How to write an address that is IPv6 with or without a port; empty if it is neither."""
    bare = address.replace("[", "").replace("]", "")
    host, _, port = bare.rpartition(":")
    # The end of ::1:8470 could be a part of the address, too; a port is what must be there.
    if _is_ipv6(host) and port.isdecimal() and int(port) <= _MAX_PORT:
        return f"[{host}]:{port}"
    return f"[{bare}]:PORT" if _is_ipv6(bare) else ""


def _is_ipv6(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv6Address)
    except ValueError:
        return False
