"""Proxies between this process and a coordinator: gRPC reads the environment by itself, for loopback, too."""

from __future__ import annotations

import ipaddress
import os
import re

# In gRPC's order; it reads none of them in upper case. A variable that is set and empty ends the search.
_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
# It takes no other scheme, and dials directly then.
_PROXY = re.compile(r"http://(?:[^/?#]*@)?(?P<proxy>[^/?#]+)", re.IGNORECASE)


def proxy_to(host: str) -> tuple[str, str] | None:
    """The variable whose proxy gRPC uses on the way to `host`, and that proxy without its password; None: direct."""
    variable = next((name for name in _VARIABLES if name in os.environ), None)
    if variable is None or _is_exempt(host.strip("[]"), os.environ.get(_exemptions(), "")):
        return None
    url = _PROXY.match(os.environ[variable])
    return (variable, url["proxy"]) if url else None


def bypass(host: str) -> str:
    """What to set so that gRPC dials `host` directly."""
    host, upper = host.strip("[]"), _exemptions().upper()
    ignored = f" (in lower case: gRPC does not read {upper})" if upper in os.environ else ""
    return f"add {host} to the variable {_exemptions()}{ignored}"


def _exemptions() -> str:
    return "no_grpc_proxy" if "no_grpc_proxy" in os.environ else "no_proxy"


def _is_exempt(host: str, exemptions: str) -> bool:
    """Whether a list for `no_proxy` has `host`, a domain of it, or a network of its address, as gRPC reads it."""
    for entry in (entry.strip().lower() for entry in exemptions.split(",")):
        if entry and f".{host.lower()}".endswith(f".{entry}"):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
