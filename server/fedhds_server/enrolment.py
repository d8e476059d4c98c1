"""Who may take part: names, keys, sessions and the base model, decided by pure functions over the run's state."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from fedhds import PROTOCOL_VERSIONS
from fedhds.errors import EnrolmentRefused, Evicted, NameInUse
from fedhds.security.identity import PeerIdentity, Role
from fedhds.tensors.manifest import AdapterManifest
from fedhds_server.state import RunState, SiteState

# Beyond any instruction data, a mistake or an attack; and NumPy draws from a pool of fewer than 10^9 rows.
_MOST_ROWS = 10**8
_MOST_POOL_ROWS = 10**9 - 1

_PARTS = {
    "weights": "the weights",
    "config": "the model configuration",
    "tokenizer": "the tokenizer",
    "template": "the prompt template",
    "feature_model": "the feature model",
}


def session_digest(session: str) -> str:
    """What the state keeps of a session's secret, so that a copy of the state lets nobody in."""
    return hashlib.sha256(session.encode()).hexdigest()


def negotiate(offered: list[int]) -> int:
    """The highest protocol version that both sides speak; raises EnrolmentRefused when there is none."""
    common = set(offered) & set(PROTOCOL_VERSIONS)
    if not common:
        raise EnrolmentRefused(
            f"no common protocol version: the site speaks {sorted(offered)}, the coordinator "
            f"{sorted(PROTOCOL_VERSIONS)}; install the same fedhds version on both"
        )
    return max(common)


def drawn_session(proposed: str) -> str:
    """The session's secret: what the site drew, or a new one; raises EnrolmentRefused for one that could be guessed."""
    if proposed and not re.fullmatch("[0-9a-f]{64}", proposed):
        raise EnrolmentRefused("the session that the site proposes is not 64 hexadecimal digits; install fedhds anew")
    return proposed or secrets.token_hex(32)


def admit(state: RunState, name: str, peer: PeerIdentity | None, *sessions: str) -> str:
    """Checks that the caller may hold `name`; returns the key to pin, empty without TLS.

    With TLS the certificate decides: the name is its name, or its name, "/" and a shard's; the same key takes over a
    live session, another key is refused for the whole run. Without TLS a live name is given only to who knows its
    session: one of `sessions`. Raises NameInUse or EnrolmentRefused.
    """
    if not name or len(name) > 128 or not name.isprintable():
        raise EnrolmentRefused("a site's name is 1 to 128 printable characters; set --name")
    key = ""
    if peer is not None:
        if peer.role is not Role.SITE:
            raise EnrolmentRefused(
                f"the certificate of {peer.name!r} is an {peer.role.value}'s, not a site's; issue one with --role site"
            )
        if name != peer.name and not name.startswith(peer.name + "/"):
            raise EnrolmentRefused(f"the certificate is {peer.name!r}'s and does not give the name {name!r}")
        key = peer.key_fingerprint
    site = state.sites.get(name)
    if site is None:
        if state.phase.over:
            raise EnrolmentRefused(f"the run is over ({state.message}); it takes no new site")
        return key
    if site.state is SiteState.EVICTED:
        raise Evicted(f"an operator has evicted the site {name!r} from this run: {site.last_error}")
    if site.key != key:
        raise NameInUse(
            f"the name {name!r} belongs to a site with another key; enrol with that key (fedhds certs issue --renew "
            "keeps it) or under another name"
        )
    known = [hmac.compare_digest(site.session, session_digest(session)) for session in sessions]
    if not key and site.live and not any(known):
        raise NameInUse(
            f"another process is enrolled as {name!r}; stop it, wait until it is taken for lost, or choose "
            "another --name"
        )
    return key


def check_attestation(
    state: RunState, fingerprint: dict[str, str], manifest: AdapterManifest, rows: int, evaluates: bool
) -> None:
    """Checks that a site holds the run's base model; raises EnrolmentRefused saying what differs."""
    if not rows and not evaluates:
        raise EnrolmentRefused("the site brings neither training rows nor held-out rows; give --data or --eval-data")
    if rows > _MOST_ROWS or rows + state.pool_rows > _MOST_POOL_ROWS:
        raise EnrolmentRefused(
            f"the site declares {rows} rows; a site may bring {_MOST_ROWS} and all together {_MOST_POOL_ROWS}"
        )
    needed = {part for part in _PARTS if part != "feature_model" or state.spec.feature_model}
    if set(fingerprint) != set(_PARTS) or not all(fingerprint[part] for part in needed):
        raise EnrolmentRefused("the site sent no complete fingerprint of its base model")
    model = manifest.parsed_config().get("base_model_name_or_path", state.spec.model)
    if model != state.spec.model:
        raise EnrolmentRefused(f"the site's adapter names another base model than the run's ({state.spec.model})")
    if not state.fingerprint:
        return
    differing = [label for part, label in _PARTS.items() if fingerprint[part] != state.fingerprint[part]]
    if differing:
        raise EnrolmentRefused(
            f"the site's base model is not the run's ({state.spec.model}): {', '.join(differing)} "
            f"differ{'s' if len(differing) == 1 else ''}; load the same files at the same revision"
        )
    if not manifest.agrees_with(state.adapter_manifest):
        raise EnrolmentRefused(
            "the site's adapter has other tensors than the run's, or another configuration; install the same peft "
            "version"
        )
