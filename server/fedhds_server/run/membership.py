"""Who takes part: names, keys, sessions and rows; what joining and leaving change. Pure functions."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from fedhds import PROTOCOL_VERSIONS
from fedhds.errors import EnrollmentRefused, Evicted, NameInUse
from fedhds.security.identity import PeerIdentity, Role
from fedhds.tensors.manifest import AdapterManifest
from fedhds_server.run import stages
from fedhds_server.run.base_model import check_model, model_forgotten, model_given
from fedhds_server.run.events import (
    Instruction,
    Record,
    SiteConnected,
    SiteEvicted,
    SiteHeard,
    SiteLeft,
    SiteRegistered,
    SiteRevoked,
    SiteSilent,
    Wake,
)
from fedhds_server.run.messages import for_site
from fedhds_server.run.parties import party_of
from fedhds_server.run.quorum import listed
from fedhds_server.run.state import Phase, RunState, Site, SiteState

# NumPy draws from a pool of fewer.
_MAX_POOL_ROWS = 10**9 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator lets the sites of one certificate do; without TLS, those with one name before the "/"."""

    max_shards: int = 1
    """Most sites; with 1 only the one that has the certificate's own name."""
    max_rows: int = 1_000_000
    """Most rows that all of them declare, for training, for evaluation and for validation each."""


DEFAULT_LIMITS = Limits()


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


def admit(
    state: RunState, name: str, peer: PeerIdentity | None, *sessions: str, limits: Limits = DEFAULT_LIMITS
) -> str:
    """Checks that the caller may have `name`; returns the key to pin, empty without TLS.

    With TLS the certificate decides: the name is its name or, where the operator allows shards, its name, "/" and a
    shard's. For the whole run a certificate's name has one key and a key one name; that key takes over a live session.
    Without TLS a live name is given only to a caller that knows its session: one of `sessions`. Raises NameInUse,
    Evicted or EnrollmentRefused.
    """
    party = party_of(name)
    if not party or len(name) > 128 or not name.isprintable():
        raise EnrollmentRefused("a site's name is 1 to 128 printable characters, not '/' first; set --name")
    key = ""
    if peer is not None:
        if peer.role is not Role.SITE:
            raise EnrollmentRefused(
                f"the certificate of {peer.name!r} is an {peer.role.value}'s, not a site's; issue one with --role site"
            )
        if party != peer.name:
            raise EnrollmentRefused(f"the certificate is {peer.name!r}'s and does not give the name {name!r}")
        key = peer.key_fingerprint
    _check_party(state, party, key)
    site = state.sites.get(name)
    if site is None:
        if state.phase.over:
            raise EnrollmentRefused(f"the run is over ({for_site(state)}); it takes no new site")
        _check_shards(state, name, limits)
        return key
    known = [hmac.compare_digest(site.session, session_digest(session)) for session in sessions]
    if not key and site.live and not any(known):
        raise NameInUse(
            f"another process is enrolled as {name!r}; stop it, wait until it counts as lost, or choose another --name"
        )
    return key


def _check_party(state: RunState, party: str, key: str) -> None:
    """Checks that a party is not evicted, and that it has the key and the name that the run knows."""
    for known in (party, key):
        if known in state.evicted:
            raise Evicted(f"an operator has evicted {party!r} from this run: {state.evicted[known]}")
    for site in state.sites.values():
        if site.party == party:
            if site.state is SiteState.EVICTED:
                raise Evicted(f"an operator has evicted {party!r} from this run: {site.last_error}")
            if site.key != key:
                raise NameInUse(
                    f"the name {party!r} belongs to a site with another key; enroll with that key (fedhds certs issue "
                    "--renew keeps it) or under another name"
                )
        elif key and site.key == key:
            raise EnrollmentRefused(
                f"the certificate of {party!r} has the key of {site.party!r}, which has enrolled; a key has one name "
                "in a run, issue a certificate with a key of its own"
            )


def _check_shards(state: RunState, name: str, limits: Limits) -> None:
    party = party_of(name)
    if limits.max_shards == 1 and name != party:
        raise EnrollmentRefused(
            f"the coordinator takes one site of each certificate, {party!r} itself and not {name!r}: give one --data, "
            "or ask its operator for --max-shards"
        )
    if len(state.sites_of(party)) >= limits.max_shards:
        raise EnrollmentRefused(
            f"{party!r} has enrolled {limits.max_shards} sites, and the coordinator takes no more of one certificate; "
            "its operator may raise --max-shards"
        )


def check_registration(
    state: RunState,
    fingerprint: dict[str, str],
    manifest: AdapterManifest,
    rows: int,
    evaluates: bool,
    *,
    site: str = "",
    evaluation_rows: int = 0,
    validation_rows: int = 0,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Checks what a site declares and that it has the run's base model; raises EnrollmentRefused, saying why."""
    if not rows and not evaluates and not validation_rows:
        raise EnrollmentRefused("the site brings neither training rows nor held-out rows; give --data or --eval-data")
    if evaluates != (evaluation_rows > 0):
        raise EnrollmentRefused("a site that evaluates declares its held-out rows, and no other; reinstall fedhds")
    others = [other for other in state.sites.values() if other.name != site and not other.excluded]
    own = [other for other in others if other.party == party_of(site)]
    for label, declared, before in (
        ("rows", rows, sum(other.rows for other in own)),
        ("held-out rows", evaluation_rows, sum(other.evaluation_rows for other in own)),
        ("validation rows", validation_rows, sum(other.validation_rows for other in own)),
    ):
        if declared + before > limits.max_rows:
            more = f", and the other sites of its certificate {before}" if before else ""
            raise EnrollmentRefused(
                f"the site declares {declared} {label}{more}; one certificate may bring {limits.max_rows}, and the "
                "operator of the coordinator may raise --max-rows-per-site"
            )
    pool = sum(other.rows for other in others)
    if pool + rows > _MAX_POOL_ROWS:
        raise EnrollmentRefused(f"the site declares {rows} rows, the others {pool}; a run takes {_MAX_POOL_ROWS}")
    check_model(state, fingerprint, manifest)


def connected(state: RunState, event: SiteConnected) -> list[Instruction]:
    """A site has its name; it may not get tasks yet."""
    site = state.sites.setdefault(event.site, Site(name=event.site))
    site.key = site.key or event.key
    site.session, site.serial = event.session, event.serial
    site.state = SiteState.CONNECTING
    # A new name does not take a party out of quarantine.
    site.quarantined = any(sibling.quarantined for sibling in state.sites_of(site.party))
    return [Wake()]


def registered(state: RunState, event: SiteRegistered) -> list[Instruction]:
    """A site takes part; the first one fixes base model and adapter."""
    site = state.sites[event.site]
    known = site.state is SiteState.ENROLLED
    site.rows, site.evaluates, site.evaluation_rows = event.rows, event.evaluates, event.evaluation_rows
    site.validation_rows = event.validation_rows
    site.state, site.last_error = SiteState.ENROLLED, ""
    instructions: list[Instruction] = []
    if not known:
        brings = [f"{event.rows} rows"] * bool(event.rows) + ["held-out rows"] * event.evaluates
        brings += [f"{event.validation_rows} rows to validate on"] * bool(event.validation_rows)
        instructions.append(Record(f"site {event.site} enrolled with {' and '.join(brings)}"))
        late = state.spec.selection.one_shot and state.round_number and event.site not in state.coresets
        if event.rows and late:
            instructions.append(
                Record(f"site {event.site} came after the selection: it gets the final adapter but trains no round")
            )
    return [*instructions, *model_given(state, event), Wake()]


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
    site.state = SiteState.ENROLLED if site.registered else SiteState.CONNECTING
    return [Record(f"site {event.site} is back"), Wake()]


def evicted(state: RunState, event: SiteEvicted) -> list[Instruction]:
    """An operator excluded a party, by a name of its sites or by its key, which may not have enrolled yet."""
    party = party_of(event.site)
    own = [site for site in state.sites.values() if site.party == party or site.key == event.site]
    for known in (party, *(site.party for site in own), *(site.key for site in own if site.key)):
        state.evicted[known] = event.reason
    instructions: list[Instruction] = []
    for site in own:
        site.state, site.last_error = SiteState.EVICTED, event.reason
        stages.withdraw(state, site=site.name)
        instructions += [*stages.exclude(state, site.name)]
    names = listed(site.name for site in own)
    who = f"site {names} is" if len(own) == 1 else f"{party} with its sites {names} is" if own else f"{party} is"
    note = Record(f"{who} evicted: {event.reason}", trouble=True)
    return [note, *instructions, *_reconsidered(state), Wake()]


def revoked(state: RunState, event: SiteRevoked) -> list[Instruction]:
    """The operator's lists no longer let a site in: its session ends, and what it delivered to the open stage goes."""
    site = state.sites[event.site]
    site.session, site.state, site.last_error = "", SiteState.LEFT, event.reason
    stages.withdraw(state, site=site.name)
    note = Record(f"site {site.name} is out: {event.reason}", trouble=True)
    return [note, *stages.exclude(state, site.name), Wake()]


def _reconsidered(state: RunState) -> list[Instruction]:
    """Before the run begins, lets the base model go that only evicted sites had."""
    if state.phase is not Phase.ENROLLING or not state.manifest:
        return []
    if any(site.registered and site.state is not SiteState.EVICTED for site in state.sites.values()):
        return []
    note = "no other site has the base model of those that were evicted: the next to register says which it is"
    return [Record(note, trouble=True), *model_forgotten(state)]
