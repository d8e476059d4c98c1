"""What takes the masks off a sum: the survivors' own masks, and those that they share with sites that dropped out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedhds.errors import PeerNotVerified
from fedhds.secure.keys import pair_key, public_key_of, self_key
from fedhds.secure.masks import MaskStream
from fedhds.secure.shamir import combine
from fedhds.secure.terms import Terms
from fedhds.v2 import secure_pb2 as pb


def secrets_of(
    terms: Terms, survivors: Sequence[str], dropped: Sequence[str], opened: Mapping[str, pb.UnmaskingShares]
) -> list[MaskStream]:
    """The streams that, applied to the sum of the survivors' masked updates, leave the sum of their updates.

    `opened` is what each site opened. Raises PeerNotVerified, naming the site, for a secret that too few shares
    give, or that is not the one that its site announced.
    """
    shares: dict[str, dict[int, bytes]] = {site: {} for site in (*survivors, *dropped)}
    for opener, answer in sorted(opened.items()):
        for share in answer.opened:
            shares[share.owner][terms.points[opener]] = share.seed_share or share.key_share
    masks = []
    for site in survivors:
        seed = _secret(terms, site, shares[site], lambda secret: terms.round_id.digest("seed", secret), "seed_digest")
        masks.append(MaskStream(self_key(terms.round_id, seed, site), subtract=True))
    for site in dropped:
        private = _secret(terms, site, shares[site], public_key_of, "mask_key")
        for other in survivors:
            key = pair_key(terms.round_id, private, terms.keys[other].mask_key, site, other)
            # The other way round than the survivor put it on.
            masks.append(MaskStream(key, subtract=other < site))
    return masks


def _secret(
    terms: Terms, site: str, shares: Mapping[int, bytes], announce: Callable[[bytes], bytes], field: str
) -> bytes:
    if len(shares) < terms.threshold:
        raise PeerNotVerified(
            f"{len(shares)} of {terms.threshold} shares of {site} could be opened; it may have sealed nonsense"
        )
    points = sorted(shares)[: terms.threshold]
    try:
        secret = combine({point: shares[point] for point in points})
    except ValueError:
        secret = b""
    if not secret or announce(secret) != getattr(terms.keys[site], field):
        raise PeerNotVerified(f"the shares of {site} do not give the secret that it announced; one of them is wrong")
    return secret
