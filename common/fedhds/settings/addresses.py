"""HOST:PORT addresses in settings."""

from __future__ import annotations

import ipaddress
import re


def addresses(server: str) -> list[str]:
    """Every HOST:PORT of a `--server`."""
    return [address.strip() for address in server.split(",")]


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
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]+", port) or int(port) > 65535:
        raise ValueError(f"http: {address!r} is not HOST:PORT")
    if not is_loopback(host) and not insecure:
        raise ValueError(
            f"http: {host} is reachable from other machines, and everybody there could read what is served; listen on "
            "127.0.0.1, or add --insecure if a firewall decides who gets there"
        )
