"""Who takes part: names, keys, sessions and the base model; what joining and leaving change. Pure functions."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from fedhds import PROTOCOL_VERSIONS
from fedhds.errors import EnrollmentRefused, Evicted, NameInUse
from fedhds.security.identity import PeerIdentity, Role
from fedhds.tensors.manifest import AdapterManifest
from fedhds_server.run import stages
from fedhds_server.run.events import (
    DrawAdapter,
    Instruction,
    Record,
    SiteConnected,
    SiteEvicted,
    SiteHeard,
    SiteLeft,
    SiteRegistered,
    SiteSilent,
    Wake,
)
from fedhds_server.run.messages import for_site
from fedhds_server.run.state import RunState, Site, SiteState, packed

# Beyond any instruction data, a mistake or an attack; and NumPy draws from a pool of fewer than 10^9 rows.
_MAX_ROWS = 10**8
_MAX_POOL_ROWS = 10**9 - 1

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
    """The highest protocol version that both sides speak; raises EnrollmentRefused when there is none."""
    common = set(offered) & set(PROTOCOL_VERSIONS)
    if not common:
        raise EnrollmentRefused(
            f"no common protocol version: the site speaks {sorted(offered)}, the coordinator "
            f"{sorted(PROTOCOL_VERSIONS)}; install the same fedhds version on both"
        )
    return max(common)


def session_secret(proposed: str) -> str:
    """The session's secret: what the site drew, or a new one; raises EnrollmentRefused for one easy to guess."""
    if proposed and not re.fullmatch("[0-9a-f]{64}", proposed):
        raise EnrollmentRefused("the session that the site proposes is not 64 hexadecimal digits; reinstall fedhds")
    return proposed or secrets.token_hex(32)


def admit(state: RunState, name: str, peer: PeerIdentity | None, *sessions: str) -> str:
    """Checks that the caller may have `name`; returns the key to pin, empty without TLS.

    With TLS the certificate decides: the name is its name, or its name, "/" and a shard's; the same key takes over a
    live session, another key is refused for the whole run. Without TLS a live name is given only to a caller that
    knows its session: one of `sessions`. Raises NameInUse or EnrollmentRefused.
    """
    if not name or len(name) > 128 or not name.isprintable():
        raise EnrollmentRefused("a site's name is 1 to 128 printable characters; set --name")
    key = ""
    if peer is not None:
        if peer.role is not Role.SITE:
            raise EnrollmentRefused(
                f"the certificate of {peer.name!r} is an {peer.role.value}'s, not a site's; issue one with --role site"
            )
        if name != peer.name and not name.startswith(peer.name + "/"):
            raise EnrollmentRefused(f"the certificate is {peer.name!r}'s and does not give the name {name!r}")
        key = peer.key_fingerprint
    site = state.sites.get(name)
    if site is None:
        if state.phase.over:
            raise EnrollmentRefused(f"the run is over ({for_site(state)}); it takes no new site")
        return key
    if site.state is SiteState.EVICTED:
        raise Evicted(f"an operator has evicted the site {name!r} from this run: {site.last_error}")
    if site.key != key:
        raise NameInUse(
            f"the name {name!r} belongs to a site with another key; enroll with that key (fedhds certs issue --renew "
            "keeps it) or under another name"
        )
    known = [hmac.compare_digest(site.session, session_digest(session)) for session in sessions]
    if not key and site.live and not any(known):
        raise NameInUse(
            f"another process is enrolled as {name!r}; stop it, wait until it counts as lost, or choose another --name"
        )
    return key


def check_registration(
    state: RunState, fingerprint: dict[str, str], manifest: AdapterManifest, rows: int, evaluates: bool
) -> None:
    """Checks that a site has the run's base model; raises EnrollmentRefused saying what differs."""
    if not rows and not evaluates:
        raise EnrollmentRefused("the site brings neither training rows nor held-out rows; give --data or --eval-data")
    if rows > _MAX_ROWS or rows + state.pool_rows > _MAX_POOL_ROWS:
        raise EnrollmentRefused(
            f"the site declares {rows} rows; a site may bring {_MAX_ROWS} and all together {_MAX_POOL_ROWS}"
        )
    needed = {part for part in _PARTS if part != "feature_model" or state.spec.selection.features.model}
    if set(fingerprint) != set(_PARTS) or not all(fingerprint[part] for part in needed):
        raise EnrollmentRefused("the site sent no complete fingerprint of its base model")
    model = manifest.parsed_config().get("base_model_name_or_path", state.spec.model.name)
    if model != state.spec.model.name:
        raise EnrollmentRefused(f"the site's adapter names another base model than the run's ({state.spec.model.name})")
    if not state.fingerprint:
        return
    differing = [label for part, label in _PARTS.items() if fingerprint[part] != state.fingerprint[part]]
    if differing:
        raise EnrollmentRefused(
            f"the site's base model is not the run's ({state.spec.model.name}): {', '.join(differing)} "
            f"differ{'s' if len(differing) == 1 else ''}; load the same files at the same revision"
        )
    if not manifest.agrees_with(state.adapter_manifest):
        raise EnrollmentRefused(
            "the site's adapter has other tensors than the run's, or another configuration; install the same peft "
            "version"
        )


def connected(state: RunState, event: SiteConnected) -> list[Instruction]:
    """A site has its name; it may not get tasks yet."""
    site = state.sites.setdefault(event.site, Site(name=event.site))
    site.key = site.key or event.key
    site.session = event.session
    site.state = SiteState.CONNECTING
    return [Wake()]


def registered(state: RunState, event: SiteRegistered) -> list[Instruction]:
    """A site takes part; the first one fixes base model and adapter."""
    site = state.sites[event.site]
    known = site.state is SiteState.ENROLLED
    site.rows, site.evaluates = event.rows, event.evaluates
    site.state, site.last_error = SiteState.ENROLLED, ""
    instructions: list[Instruction] = []
    if not known:
        brings = [f"{event.rows} rows"] * bool(event.rows) + ["held-out rows"] * event.evaluates
        instructions.append(Record(f"site {event.site} enrolled with {' and '.join(brings)}"))
        late = state.spec.selection.one_shot and state.round_number and event.site not in state.coresets
        if event.rows and late:
            instructions.append(
                Record(f"site {event.site} came after the selection: it gets the final adapter but trains no round")
            )
    if not state.manifest:
        state.fingerprint = event.fingerprint
        state.manifest = packed(event.manifest.to_proto())
        instructions.append(DrawAdapter())
    return [*instructions, Wake()]


def gone(state: RunState, event: SiteSilent | SiteLeft) -> list[Instruction]:
    """A site is silent, or said goodbye."""
    site = state.sites[event.site]
    if not site.live:
        return []
    silent = isinstance(event, SiteSilent)
    site.state = SiteState.LOST if silent else SiteState.LEFT
    if isinstance(event, SiteLeft):
        site.last_error = event.reason or site.last_error
        # Nothing more can come from a site that said goodbye; a lost one may yet return to its task.
        stages.withdraw(state, site=event.site)
    because = f": {event.reason}" if isinstance(event, SiteLeft) and event.reason else ""
    message = f"site {event.site} {'is lost (no sign of life)' if silent else 'left'}{because}"
    return [Record(message, trouble=not state.phase.over), Wake()]


def heard(state: RunState, event: SiteHeard) -> list[Instruction]:
    """A lost site is back."""
    site = state.sites[event.site]
    if site.state is not SiteState.LOST:
        return []
    site.state = SiteState.ENROLLED if site.rows or site.evaluates else SiteState.CONNECTING
    return [Record(f"site {event.site} is back"), Wake()]


def evicted(state: RunState, event: SiteEvicted) -> list[Instruction]:
    """An operator excluded a site."""
    site = state.sites[event.site]
    site.state, site.last_error = SiteState.EVICTED, event.reason
    stages.withdraw(state, site=event.site)
    note = Record(f"site {event.site} is evicted: {event.reason}", trouble=True)
    return [note, *stages.exclude(state, event.site), Wake()]
