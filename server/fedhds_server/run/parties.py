"""Parties: all sites of one certificate, which count as one wherever sites are counted."""

from __future__ import annotations

from collections.abc import Iterable


def party_of(site: str) -> str:
    """The party behind a site's name: what comes before the first "/", which no certificate's name has.

    With TLS it is the certificate's name, which a run pins to one key (`membership.admit`). Without TLS it is what the
    site says of itself, and proves nothing.
    """
    return site.partition("/")[0]


def parties(sites: Iterable[str]) -> set[str]:
    """The parties behind sites."""
    return {party_of(site) for site in sites}
