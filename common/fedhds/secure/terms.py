"""The terms of one round: who takes part with which keys and weights, and how many shares unmask the sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from fedhds.errors import PeerNotVerified, TooFewSites
from fedhds.secure.keys import KEY_BYTES, RoundId
from fedhds.secure.quantization import MAX_SITES, WEIGHT_UNIT
from fedhds.secure.signatures import check_signature
from fedhds.v2 import secure_pb2 as pb


def parties_of(sites: Collection[str]) -> set[str]:
    """The certificates behind sites: a name's part before the first "/"."""
    return {site.partition("/")[0] for site in sites}


def threshold_of(sites: int, share: float) -> int:
    """Shares that unmask a round of so many sites: `share` of them, and more than half in any case."""
    return max(math.ceil(sites * share - 1e-9), sites // 2 + 1)


def integer_weights(shares: Mapping[str, float]) -> dict[str, int]:
    """Shares that sum to 1 as weights: at least 1 each, `WEIGHT_UNIT` in all at most."""
    spare = WEIGHT_UNIT - len(shares)
    return {site: 1 + math.floor(share * spare * (1 - 1e-12)) for site, share in shares.items()}


def keys_statement(round_id: RoundId, keys: pb.RoundKeys) -> bytes:
    """What a site signs with its keys."""
    parts = (keys.site, keys.share_key, keys.mask_key, keys.seed_digest, keys.adapter_digest)
    return round_id.statement("keys", *parts)


@dataclass(frozen=True)
class Terms:
    """With whom a round runs, as one site or the coordinator has checked it."""

    round_id: RoundId
    threshold: int
    keys: Mapping[str, pb.RoundKeys]
    """By site, in the order of names; a site's place in it is the point of its shares."""
    weights: Mapping[str, int]
    public_keys: Mapping[str, bytes]
    """The certificates' keys, SubjectPublicKeyInfo in DER."""

    @classmethod
    def of(
        cls, round_id: RoundId, peers: pb.RoundPeers, public_key_of: Callable[[Sequence[bytes], str], bytes]
    ) -> Terms:
        """Checks every site's keys and signature; `public_key_of` gives the key of a site's certificates.

        Raises PeerNotVerified.
        """
        names = [peer.keys.site for peer in peers.peers]
        if names != sorted(set(names)):
            raise PeerNotVerified("the round's list of sites has a name twice, or is not in order")
        public_keys = {}
        for peer in peers.peers:
            keys = peer.keys
            check_shape(keys)
            if keys.adapter_digest != peers.peers[0].keys.adapter_digest:
                raise PeerNotVerified(f"{keys.site} starts from another global adapter than {names[0]}")
            public_keys[keys.site] = public_key_of(list(keys.certificates), keys.site)
            check_signature(public_keys[keys.site], keys.signature, keys_statement(round_id, keys), keys.site)
        return cls(
            round_id,
            peers.threshold,
            {peer.keys.site: peer.keys for peer in peers.peers},
            {peer.keys.site: peer.weight for peer in peers.peers},
            public_keys,
        )

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that the terms say, certificates and signatures apart."""
        parts: list[str | bytes | int] = [self.threshold]
        for site, keys in self.keys.items():
            parts += [site, keys.share_key, keys.mask_key, keys.seed_digest, keys.adapter_digest, self.weights[site]]
        return self.round_id.digest("terms", *parts)

    @functools.cached_property
    def points(self) -> dict[str, int]:
        """Where each site's shares are taken, from 1."""
        return {site: point for point, site in enumerate(self.keys, 1)}

    def check(self, *, min_parties: int, threshold_share: float, max_weight_share: float) -> None:
        """Raises TooFewSites unless sums of so many sites, with such weights, hide each of them."""
        sites, parties = list(self.keys), parties_of(self.keys)
        if len(parties) < min_parties:
            raise TooFewSites(f"the round has sites of {len(parties)} certificates, secure sums need {min_parties}")
        if len(sites) > MAX_SITES:
            raise TooFewSites(f"the round has {len(sites)} sites, secure aggregation takes at most {MAX_SITES}")
        if self.threshold != threshold_of(len(sites), threshold_share):
            raise TooFewSites(
                f"the round is unmasked by {self.threshold} of {len(sites)} shares, against the run's rule"
            )
        if min(self.weights.values()) < 1 or sum(self.weights.values()) > WEIGHT_UNIT:
            raise TooFewSites("the weights of the round's sites are none, or more than the ring holds")
        for party in parties:
            own = [site for site in sites if site.partition("/")[0] == party]
            if len(own) >= self.threshold:
                raise TooFewSites(f"{party} alone has {len(own)} of the {self.threshold} shares that unmask the round")
            share = sum(self.weights[site] for site in own) / sum(self.weights.values())
            if share > max(max_weight_share, 1 / len(parties)) + len(sites) / WEIGHT_UNIT:
                raise TooFewSites(
                    f"{party} counts for {share:.0%} of the sum, beyond the run's --max-weight-share; a sum that is "
                    "mostly one site's hides nothing of it"
                )

    def check_listed(self, sites: Collection[str], min_parties: int, what: str) -> None:
        """Raises TooFewSites when `sites`, which are `what`, are too few, PeerNotVerified for a stranger in them."""
        if strangers := set(sites) - set(self.keys):
            raise PeerNotVerified(f"{min(strangers)} is {what}, and gave no keys in this round")
        if len(sites) < self.threshold or len(parties_of(sites)) < min_parties:
            raise TooFewSites(
                f"{len(sites)} sites of {len(parties_of(sites))} certificates are {what}; the round needs "
                f"{self.threshold} sites of {min_parties} certificates"
            )


def lists_statement(
    round_id: RoundId,
    terms: bytes,
    signer: str,
    sharing: Sequence[str],
    survivors: Sequence[str],
    dropped: Sequence[str],
) -> bytes:
    """What a site signs before it opens any share; `terms` is the digest of the round's terms."""
    parts: list[str | bytes | int] = [signer, terms]
    for names in (sharing, survivors, dropped):
        parts += [len(names), *names]
    return round_id.statement("survivors", *parts)


def masked_statement(round_id: RoundId, terms: bytes, site: str, digest: str, clipped_to: float) -> bytes:
    """What a site signs with its masked update of a digest: that it was clipped to this norm before."""
    return round_id.statement("masked update", site, terms, digest, repr(clipped_to))


def check_shape(keys: pb.RoundKeys) -> None:
    """Raises PeerNotVerified for keys that are none."""
    if not keys.site or {len(keys.share_key), len(keys.mask_key), len(keys.seed_digest)} != {KEY_BYTES}:
        raise PeerNotVerified(f"the keys of {keys.site[:200]!r} are not of {KEY_BYTES} bytes each")
