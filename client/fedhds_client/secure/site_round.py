"""A site's answers in one secure round (Bonawitz et al. 2017, fig. 4), and what it refuses: the coordinator may lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedhds.errors import (
    BothSharesAsked,
    ListChanged,
    PeerNotVerified,
    RoundReplayed,
    SecureAggregationError,
    TooFewSites,
)
from fedhds.secure.keys import RoundId, pair_key, public_key_of, self_key
from fedhds.secure.masks import MaskStream
from fedhds.secure.quantization import Ring32
from fedhds.secure.sealing import seal, unseal
from fedhds.secure.shamir import SHARE_BYTES, split
from fedhds.secure.signatures import Authority, Signer, check_signature, public_key_of_certificate
from fedhds.secure.terms import Terms, keys_statement, lists_statement, masked_statement
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import secure_pb2 as pb
from fedhds_client.secure.round_record import RoundRecord


class SiteRound:
    """One round at one site. Every answer is durable before it is returned, and comes again as it was.

    All methods raise SecureAggregationError or a class of it for what they refuse, and StorageError.
    """

    def __init__(
        self,
        path: Path,
        round_id: RoundId,
        site: str,
        spec: RunSpec,
        signer: Signer,
        authority: Authority,
        *,
        adapter: str,
        min_parties: int = 0,
    ) -> None:
        """`path` is the record of this site and run, `adapter` the digest of the global adapter that the coordinator
        gives now, `min_parties` the site's own limit.
        """
        self._path, self._round_id, self._site, self._spec = path, round_id, site, spec
        self._signer, self._authority = signer, authority
        self._min_parties = max(min_parties, spec.secure.min_sites)
        self._record = RoundRecord.at(path, round_id.number)
        self._terms: Terms | None = None
        self._adapter = adapter
        if self._record.keys and pb.RoundKeys.FromString(self._record.keys).adapter_digest != adapter:
            raise ListChanged(
                f"the coordinator gives another global adapter in the middle of round {round_id.number}; sites that "
                "start from different ones do not hide each other"
            )

    def keys(self) -> pb.RoundKeys:
        """The first answer: public keys, signed."""
        record = self._record
        if not record.keys:
            keys = pb.RoundKeys(
                site=self._site,
                share_key=public_key_of(record.share_private),
                mask_key=public_key_of(record.mask_private),
                seed_digest=self._round_id.digest("seed", record.seed),
                adapter_digest=self._adapter,
                certificates=self._signer.certificates,
            )
            keys.signature = self._signer.sign(keys_statement(self._round_id, keys))
            record.keys = keys.SerializeToString(deterministic=True)
            record.save(self._path)
        return pb.RoundKeys.FromString(record.keys)

    def shares(self, peers: pb.RoundPeers) -> pb.SealedShares:
        """The second answer: shares of both secrets for every other site, when all of them are who they should be."""
        record = self._record
        if not record.keys:
            raise RoundReplayed(
                f"round {record.round_number} is at its second step, and this site has drawn no keys for it; it joins "
                "again in the next round"
            )
        given = peers.SerializeToString(deterministic=True)
        if record.peers:
            if record.peers != given:
                raise ListChanged(
                    f"the coordinator gives a second, different list of sites for round {record.round_number}; this "
                    "site stays with the first one"
                )
            return pb.SealedShares.FromString(record.sealed)
        terms = Terms.of(self._round_id, peers, self._authority.public_key_of)
        own = pb.RoundKeys.FromString(record.keys)
        if terms.keys.get(self._site) != own:
            raise PeerNotVerified(
                f"the coordinator shows the other sites keys under the name {self._site} that are not this site's"
            )
        terms.check(
            min_parties=self._min_parties,
            threshold_share=self._spec.secure.threshold,
            max_weight_share=self._spec.aggregation.max_weight_share,
        )
        count = len(terms.keys)
        key_shares = split(record.mask_private, terms.threshold, count)
        seed_shares = split(record.seed, terms.threshold, count)
        # The own one too: it is opened like those of others.
        sealed = [
            pb.SealedShare(
                site=site,
                sealed=seal(
                    self._round_id,
                    record.share_private,
                    terms.keys[site].share_key,
                    seed_shares[point - 1] + key_shares[point - 1],
                    sender=self._site,
                    receiver=site,
                    peers=terms.digest,
                ),
            )
            for site, point in terms.points.items()
        ]
        answer = pb.SealedShares(shares=sealed)
        record.peers, record.sealed = given, answer.SerializeToString(deterministic=True)
        record.save(self._path)
        return answer

    def begin_masking(self, sharing: Sequence[str]) -> None:
        """Fixes the sites that the update is masked for."""
        record, terms = self._record, self._known_terms()
        if record.sharing and record.sharing != tuple(sharing):
            raise ListChanged(
                f"the coordinator gives a second, different list of sites to mask for in round {record.round_number}"
            )
        _check_sorted(sharing)
        terms.check_listed(sharing, self._min_parties, "sharing secrets")
        if self._site not in sharing:
            raise TooFewSites("this site should mask an update for a round that it is not in")
        if not record.sharing:
            record.sharing = tuple(sharing)
            record.save(self._path)

    @property
    def weight(self) -> int:
        """How much this site counts, in units of 2^-20."""
        return self._known_terms().weights[self._site]

    @property
    def ring(self) -> Ring32:
        """How values become integers in this round."""
        return Ring32(self._spec.secure.clip_norm, len(self._known_terms().keys))

    def rounding(self) -> MaskStream:
        """The noise that rounds the update, the same at each call."""
        return MaskStream(self._record.rounding)

    def masks(self) -> list[MaskStream]:
        """All masks on this site's update; they MUST be put on one vector alone, which `keep_masked` sees to."""
        record, terms = self._record, self._known_terms()
        if record.masked or not record.sharing:
            raise SecureAggregationError("the masks of this round are used already, or not agreed on")
        masks = [MaskStream(self_key(self._round_id, record.seed, self._site))]
        for other in record.sharing:
            if other != self._site:
                key = pair_key(self._round_id, record.mask_private, terms.keys[other].mask_key, self._site, other)
                masks.append(MaskStream(key, subtract=self._site > other))
        return masks

    def masked(self, path: Path) -> pb.MaskedUpdate | None:
        """The third answer when it was given before, whose bytes are at `path`; None when nothing was masked yet.

        Raises SecureAggregationError when they are gone: another update under the same masks would show both.
        """
        if not self._record.masked:
            return None
        answer = pb.MaskedUpdate.FromString(self._record.masked)
        if not path.exists() or Artifact.of_file(path) != Artifact.from_proto(answer.masked_update):
            raise SecureAggregationError(
                f"the masked update of round {self._record.round_number} was sent, or is damaged, and no other one is "
                "masked with the same keys; this site sits the round out"
            )
        return answer

    def keep_masked(self, artifact: Artifact) -> pb.MaskedUpdate:
        """The third answer, for a vector whose bytes are durable; from now on no other one is masked."""
        clip_norm = self._spec.secure.clip_norm
        terms = self._known_terms().digest
        statement = masked_statement(self._round_id, terms, self._site, artifact.digest, clip_norm)
        answer = pb.MaskedUpdate(
            masked_update=artifact.to_proto(), clipped_to=clip_norm, signature=self._signer.sign(statement)
        )
        self._record.masked = answer.SerializeToString(deterministic=True)
        self._record.save(self._path)
        return answer

    def sign(self, lists: pb.SurvivorsRequest) -> pb.SignedSurvivors:
        """The fourth answer: this site's signature under the lists, the first and only ones of the round."""
        record = self._record
        self._check_lists(lists)
        if not record.signed:
            record.survivors, record.dropped = tuple(lists.survivors), tuple(lists.dropped)
            answer = pb.SignedSurvivors(signature=self._signer.sign(self._lists_statement(self._site)))
            record.signed = answer.SerializeToString(deterministic=True)
            record.save(self._path)
        return pb.SignedSurvivors.FromString(record.signed)

    def open(self, request: pb.UnmaskRequest) -> pb.UnmaskingShares:
        """The fifth answer: of each site one of its two shares, if as many as the threshold signed the same lists."""
        record = self._record
        self._check_lists(request.lists)
        if not record.signed:
            raise RoundReplayed("shares are asked for before this site has signed which sites are in the sum")
        if record.opened:
            return pb.UnmaskingShares.FromString(record.opened)
        terms = self._known_terms()
        signers = {signature.site for signature in request.signatures}
        terms.check_listed(signers, 1, "signing the lists")
        if strangers := signers - set(record.survivors):
            raise PeerNotVerified(f"{min(strangers)} signs the lists, and is not in the sum")
        for signature in request.signatures:
            key, statement = terms.public_keys[signature.site], self._lists_statement(signature.site)
            check_signature(key, signature.signature, statement, signature.site)
        answer = pb.UnmaskingShares()
        for share in request.shares:
            if share.site not in record.sharing:
                raise PeerNotVerified(f"shares stand under the name {share.site}, which shared none in this round")
            try:
                both = unseal(
                    self._round_id,
                    record.share_private,
                    terms.keys[share.site].share_key,
                    share.sealed,
                    sender=share.site,
                    receiver=self._site,
                    peers=terms.digest,
                )
            except PeerNotVerified:
                # One site that sealed nonsense must not take all others' shares away.
                continue
            if share.site in record.survivors:
                answer.opened.add(owner=share.site, seed_share=both[:SHARE_BYTES])
            else:
                answer.opened.add(owner=share.site, key_share=both[SHARE_BYTES:])
        record.opened = answer.SerializeToString(deterministic=True)
        record.forget()
        record.save(self._path)
        return answer

    def _check_lists(self, lists: pb.SurvivorsRequest) -> None:
        """Raises unless the lists part the sites that shared secrets, and are those that this site signed, if any."""
        record, terms = self._record, self._known_terms()
        if not record.masked:
            raise RoundReplayed(
                f"round {record.round_number} is at its end, and this site has sent no masked update in it"
            )
        survivors, dropped = list(lists.survivors), list(lists.dropped)
        if both := set(survivors) & set(dropped):
            raise BothSharesAsked(
                f"{min(both)} is on the list of survivors and on that of dropped sites; its two shares together "
                "would open its update"
            )
        if record.signed and (tuple(survivors), tuple(dropped)) != (record.survivors, record.dropped):
            raise ListChanged(
                f"the coordinator gives a second, different list of survivors for round {record.round_number}; this "
                "site stays with the one that it signed"
            )
        _check_sorted(survivors)
        _check_sorted(dropped)
        if sorted(survivors + dropped) != list(record.sharing):
            raise ListChanged("the lists of survivors and dropped sites are not those that shared their secrets")
        terms.check_listed(survivors, self._min_parties, "in the sum")
        if self._site not in survivors:
            raise TooFewSites("this site should sign a list of survivors that it is not on")

    def _lists_statement(self, signer: str) -> bytes:
        record, terms = self._record, self._known_terms().digest
        return lists_statement(self._round_id, terms, signer, record.sharing, record.survivors, record.dropped)

    def _known_terms(self) -> Terms:
        if not self._record.peers:
            raise RoundReplayed(
                f"a later step of round {self._record.round_number} is asked for, and this site knows no list of sites "
                "for it; it joins again in the next round"
            )
        if self._terms is None:
            # Certificates were judged before the list was saved; a round may outlive one.
            peers = pb.RoundPeers.FromString(self._record.peers)
            self._terms = Terms.of(self._round_id, peers, lambda chain, _: public_key_of_certificate(chain[0]))
        return self._terms


def _check_sorted(names: Sequence[str]) -> None:
    if list(names) != sorted(set(names)):
        raise PeerNotVerified("a list of sites has a name twice, or is not in order")
