"""A site in secure rounds against a coordinator that means harm: each attack is refused with an error of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from fedhds.errors import (
    BothSharesAsked,
    FedhdsError,
    ListChanged,
    PeerNotVerified,
    RoundReplayed,
    SecureAggregationError,
    TooFewSites,
)
from fedhds.secure.keys import new_private_key, public_key_of
from fedhds.secure.terms import keys_statement
from fedhds.v2 import secure_pb2 as pb
from fedhds_client.secure.site_round import SiteRound
from tests.support.secure_rounds import SecureRun, signer

NAMES = tuple("abcde")


@pytest.fixture
def run(tmp_path: Path) -> SecureRun:
    return SecureRun(tmp_path, NAMES)


def reach(run: SecureRun, step: int) -> AnyMessage:
    """All sites answer until `step` is open; what site a is asked in it."""
    for _ in range(step):
        for site in run.names:
            run.respond(site)
        run.close()
    assert not run.failures
    return run.asked("a")


def peers_of(run: SecureRun) -> pb.RoundPeers:
    return pb.RoundPeers.FromString(reach(run, 1).value)


def refused(run: SecureRun, request: Message, error: type[FedhdsError], reason: str, site: str = "a") -> None:
    """Two processes of the site, one after the other, refuse the request for the same reason."""
    wrapped = AnyMessage()
    wrapped.Pack(request)
    for _ in range(2):
        with pytest.raises(error, match=reason) as caught:
            run.answer(site, wrapped)
        assert type(caught.value) is error


# The list of keys.


def swapped(peers: pb.RoundPeers, name: str, **keys: bytes) -> pb.RoundPeers:
    changed = pb.RoundPeers()
    changed.CopyFrom(peers)
    entry = next(peer.keys for peer in changed.peers if peer.keys.site == name)
    for field, value in keys.items():
        setattr(entry, field, value)
    return changed


@pytest.mark.parametrize("field", ["mask_key", "share_key", "seed_digest"])
def test_swapped_keys_of_another_site_are_refused(run: SecureRun, field: str) -> None:
    peers = swapped(peers_of(run), "b", **{field: public_key_of(new_private_key())})
    refused(run, peers, PeerNotVerified, "b did not sign what stands under its name")


def test_keys_under_a_name_that_the_coordinator_signs_for_itself_are_refused(run: SecureRun) -> None:
    """It holds the certificate of site c, and puts keys of its own under the name of b."""
    peers = peers_of(run)
    entry = next(peer.keys for peer in peers.peers if peer.keys.site == "b")
    entry.mask_key = public_key_of(new_private_key())
    entry.signature = signer("c").sign(keys_statement(run.site_round("a")._round_id, entry))
    refused(run, peers, PeerNotVerified, "b did not sign")
    del entry.certificates[:]
    entry.certificates.extend(signer("c").certificates)
    refused(run, peers, PeerNotVerified, "under the name b is for the site c")


def test_own_keys_that_others_would_see_swapped_are_noticed(run: SecureRun) -> None:
    peers = peers_of(run)
    entry = next(peer.keys for peer in peers.peers if peer.keys.site == "a")
    entry.mask_key = public_key_of(new_private_key())
    entry.signature = signer("a").sign(keys_statement(run.site_round("a")._round_id, entry))
    refused(run, peers, PeerNotVerified, "under the name a that are not this site's")


def test_keys_of_an_earlier_round_are_refused(run: SecureRun) -> None:
    old = peers_of(run)
    run.play()
    new = peers_of(run)
    for index, peer in enumerate(new.peers):
        if peer.keys.site == "b":
            peer.keys.CopyFrom(old.peers[index].keys)
            peer.keys.adapter_digest = run.state.adapter.digest
    refused(run, new, PeerNotVerified, "b did not sign")


def test_another_adapter_for_other_sites_is_refused(run: SecureRun) -> None:
    peers = peers_of(run)
    entry = next(peer.keys for peer in peers.peers if peer.keys.site == "b")
    entry.adapter_digest = "1" * 64
    entry.signature = signer("b").sign(keys_statement(run.site_round("a")._round_id, entry))
    refused(run, peers, PeerNotVerified, "b starts from another global adapter than a")
    with pytest.raises(ListChanged, match="another global adapter in the middle of round 1"):
        run.site_round("a", adapter="1" * 64)


Change = Callable[[pb.RoundPeers], None]


def weigh(site: str, weight: int) -> Change:
    def change(peers: pb.RoundPeers) -> None:
        next(peer for peer in peers.peers if peer.keys.site == site).weight = weight

    return change


def only(count: int) -> Change:
    def change(peers: pb.RoundPeers) -> None:
        del peers.peers[count:]

    return change


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (only(2), TooFewSites, "sites of 2 certificates"),
        (lambda peers: setattr(peers, "threshold", 2), TooFewSites, "unmasked by 2 of 5 shares"),
        (lambda peers: setattr(peers, "threshold", 5), TooFewSites, "unmasked by 5 of 5 shares"),
        (weigh("b", 0), TooFewSites, "weights"),
        (weigh("b", 1 << 21), TooFewSites, "weights"),
        (lambda peers: peers.peers.reverse(), PeerNotVerified, "not in order"),
        (lambda peers: peers.peers.append(peers.peers[-1]), PeerNotVerified, "twice"),
    ],
)
def test_terms_that_hide_nobody_are_refused(
    run: SecureRun, change: Change, error: type[FedhdsError], reason: str
) -> None:
    peers = peers_of(run)
    change(peers)
    refused(run, peers, error, reason)


def test_a_sum_that_is_mostly_one_site_is_refused(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, NAMES, {"max_weight_share": 0.5})
    peers = peers_of(run)
    for peer in peers.peers:
        peer.weight = 900_000 if peer.keys.site == "a" else 1
    refused(run, peers, TooFewSites, "a counts for 100% of the sum")


def test_one_certificate_never_has_the_shares_that_unmask(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, ("a/1", "a/2", "a/3", "a/4", "a/5", "a/6", "b", "c"))
    for site in run.names:
        run.respond(site)
    run.close()
    with pytest.raises(TooFewSites, match="a alone has 6 of the 6 shares"):
        run.answer("b", run.asked("b"))


def test_a_site_has_its_own_limit(run: SecureRun) -> None:
    peers = peers_of(run)
    with pytest.raises(TooFewSites, match="5 certificates, secure sums need 6"):
        run.site_round("a", min_parties=6).shares(peers)


# Lists that change.


def test_a_second_list_of_keys_is_refused(run: SecureRun) -> None:
    peers = peers_of(run)
    run.answer("a", run.asked("a"))
    peers.peers[1].weight -= 1
    refused(run, peers, ListChanged, "second, different list of sites for round 1")


def test_a_second_list_to_mask_for_is_refused(run: SecureRun) -> None:
    request = pb.MaskRequest.FromString(reach(run, 2).value)
    run.answer("a", run.asked("a"))
    request.sharing.remove("e")
    refused(run, request, ListChanged, "second, different list of sites to mask for")


@pytest.mark.parametrize(
    ("sharing", "error", "reason"),
    [("abc", TooFewSites, "3 sites of 3"), ("bcde", TooFewSites, "not in"), ("abcdx", PeerNotVerified, "x is sharing")],
)
def test_a_list_to_mask_for_that_hides_nobody_is_refused(
    run: SecureRun, sharing: str, error: type[FedhdsError], reason: str
) -> None:
    reach(run, 2)
    refused(run, pb.MaskRequest(sharing=sharing), error, reason)


def test_a_split_list_of_survivors_is_refused_before_and_after_a_restart(run: SecureRun) -> None:
    lists = pb.SurvivorsRequest.FromString(reach(run, 3).value)
    run.answer("a", run.asked("a"))
    split = pb.SurvivorsRequest(survivors="abce", dropped="d")
    assert list(lists.survivors) == list("abcde")
    refused(run, split, ListChanged, "second, different list of survivors for round 1")
    # Nor are shares opened under the other list, were it signed by all others.
    refused(run, pb.UnmaskRequest(lists=split), ListChanged, "second, different list of survivors")


def test_lists_that_not_enough_others_signed_open_nothing(run: SecureRun) -> None:
    request = pb.UnmaskRequest.FromString(reach(run, 4).value)
    del request.signatures[3:]
    refused(run, request, TooFewSites, "3 sites of 3 certificates are signing")


@pytest.mark.parametrize("attack", ["other list", "other signer", "twice"])
def test_signatures_under_another_list_open_nothing(run: SecureRun, attack: str) -> None:
    request = pb.UnmaskRequest.FromString(reach(run, 4).value)
    if attack == "other list":
        # Site b was shown another list by the coordinator, and signed that.
        other = run.site_round("b")
        other._record.survivors, other._record.dropped = tuple("abce"), ("d",)
        request.signatures[1].signature = signer("b").sign(other._lists_statement("b"))
        refused(run, request, PeerNotVerified, "b did not sign")
    elif attack == "other signer":
        request.signatures[1].signature = request.signatures[2].signature
        refused(run, request, PeerNotVerified, "b did not sign")
    else:
        del request.signatures[3:]
        request.signatures.extend([request.signatures[0]] * 3)
        refused(run, request, TooFewSites, "3 sites")


def test_both_kinds_of_shares_of_one_site_are_refused(run: SecureRun) -> None:
    request = reach(run, 3)
    refused(run, pb.SurvivorsRequest(survivors="abcde", dropped="b"), BothSharesAsked, "b is on the list of survivors")
    run.answer("a", request)
    both = pb.SurvivorsRequest(survivors="abcde", dropped="b")
    refused(run, pb.UnmaskRequest(lists=both), BothSharesAsked, "its two shares together")


@pytest.mark.parametrize(
    ("survivors", "dropped", "error", "reason"),
    [
        ("abc", "de", TooFewSites, "3 sites of 3 certificates are in the sum"),
        ("abcd", "", ListChanged, "not those that shared"),
        ("abcdex", "", ListChanged, "not those that shared"),
        ("bcde", "a", TooFewSites, "that it is not on"),
        ("abced", "", PeerNotVerified, "not in order"),
    ],
)
def test_other_lists_of_survivors_are_refused(
    run: SecureRun, survivors: str, dropped: str, error: type[FedhdsError], reason: str
) -> None:
    reach(run, 3)
    refused(run, pb.SurvivorsRequest(survivors=survivors, dropped=dropped), error, reason)


def test_of_each_site_one_kind_of_share_is_opened(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abcdef"), {"deadline": 1})
    for step in range(4):
        for site in "abcdef"[: 6 if step < 2 else 5]:
            run.respond(site)
        if step == 2:
            assert run.state.stage is not None
            run.state.stage.deadline_reached = True
            run.state.tasks.clear()
        run.close()
    answer, _ = run.answer("a", run.asked("a"))
    assert isinstance(answer, pb.UnmaskingShares)
    kinds = {share.owner: share.WhichOneof("share") for share in answer.opened}
    assert kinds == {**dict.fromkeys("abcde", "seed_share"), "f": "key_share"}


def test_a_peer_that_sealed_nonsense_takes_nobody_elses_shares_away(run: SecureRun) -> None:
    request = pb.UnmaskRequest.FromString(reach(run, 4).value)
    next(share for share in request.shares if share.site == "b").sealed = bytes(94)
    answer = run.site_round("a").open(request)
    assert {share.owner for share in answer.opened} == set("acde")
    request.shares[0].site = "x"
    with pytest.raises(PeerNotVerified, match="x, which shared none"):
        run.site_round("b").open(request)


# Again, and out of turn.


def test_a_coordinator_that_asks_again_after_a_crash_gets_the_same_bytes(run: SecureRun) -> None:
    for step in range(5):
        request = reach(run, 1) if step else run.asked("a")
        first = run.answer("a", request)[0].SerializeToString(deterministic=True)
        assert run.answer("a", request)[0].SerializeToString(deterministic=True) == first


def test_a_round_that_is_over_is_not_answered_again(run: SecureRun) -> None:
    requests = [run.asked("a")]
    for _ in range(4):
        requests.append(reach(run, 1))
    run.play()
    run.respond("a")
    for _ in requests:
        with pytest.raises(RoundReplayed, match="asks for round 1, and this site has begun round 2"):
            run.site_round("a", 1)


def test_secrets_are_gone_after_the_last_answer_and_after_the_next_round_begins(run: SecureRun) -> None:
    path = run.folder / "sites" / "a" / "secure-round.json"
    reach(run, 4)
    site_round: SiteRound = run.site_round("a")
    secrets = [site_round._record.mask_private.hex(), site_round._record.seed.hex(), site_round._record.rounding.hex()]
    assert all(secret in path.read_text() for secret in secrets)
    assert path.stat().st_mode & 0o077 == 0
    run.respond("a")
    assert not any(secret in path.read_text() for secret in secrets)


@pytest.mark.parametrize("step", range(1, 5))
def test_a_step_whose_earlier_ones_the_site_does_not_know_is_refused(run: SecureRun, step: int) -> None:
    """As after its state folder was deleted: it has no part in this round, and may be in the next."""
    request = reach(run, step)
    (run.folder / "sites" / "a" / "secure-round.json").unlink()
    with pytest.raises(RoundReplayed):
        run.answer("a", request)


def test_no_second_update_is_masked_with_the_same_keys(run: SecureRun) -> None:
    request = reach(run, 2)
    _, path = run.answer("a", request)
    assert path is not None
    with pytest.raises(SecureAggregationError, match="used already"):
        run.site_round("a").masks()
    path.write_bytes(b"damaged")
    with pytest.raises(SecureAggregationError, match="no other one is masked with the same keys"):
        run.answer("a", request)


def test_a_record_that_cannot_be_read_ends_the_sites_part(run: SecureRun) -> None:
    run.respond("a")
    path = run.folder / "sites" / "a" / "secure-round.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(SecureAggregationError, match="does not know what it has answered"):
        run.answer("a", run.asked("b"))
