"""How much of this process one peer can use at a time: messages that are read, calls that wait, enrollments.

A peer is a certificate's key; without TLS it is an address. Message bytes cost memory as soon as a call reads them, and
gRPC has one limit of length for all methods, so calls take turns to read: 64 KiB of each wait meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from fedhds.errors import RequestError
from fedhds.tensors.manifest import MAX_CONFIG_BYTES, MAX_TENSORS
from fedhds.transfer.chunks import MAX_CHUNK
from fedhds_server.coordinator import Coordinator
from fedhds_server.rpc.peers import key_of, peer_of
from fedhds_server.rpc.rates import Rates
from fedhds_server.workflows import TASK_KINDS

# The coordinator of the run while this process leads; raises NotLeading while it does not.
Leading = Callable[[], Coordinator]

# Bytes. Names, counts and a reason: all that most methods take.
SMALL_MESSAGE = 1 << 16
# Of a tensor, 150 are usual. Nothing else is as long: adapters and long reports are streamed.
_MAX_MANIFEST = MAX_TENSORS << 8
MAX_MESSAGE = _MAX_MANIFEST + SMALL_MESSAGE
# Calls of a peer that read at the same time: of methods with large messages, where the next one waits until a large one
# is answered, and of all others, whose messages are read in an instant also where a thousand sites share a process.
_READING_LARGE, _READING = 1, 2
# Large messages that are decoded and checked at the same time, of all peers.
_LARGE = 2
# Calls of a peer that wait for their turn: the heartbeats and polls of some thousand sites of one process.
_MAX_WAITING = 4096
# Enrollments of a peer: at once, and per second after that.
_ENROLLMENTS, _ENROLLMENTS_PER_S = 1024, 4.0
# Peers that are remembered; those that do nothing are forgotten beyond.
_MAX_PEERS = 4096

_FEDERATION = "/fedhds.v2.Federation/"
# A manifest; a report.
_LARGE_METHODS = (f"{_FEDERATION}Register", f"{_FEDERATION}CompleteTask")
# The field `session`, number 1 of every request that has one: tag, then 64 bytes of length.
_SESSION = b"\x0a\x40"


def usual_length(method: str) -> int:
    """Bytes of a message that the method takes without a further look."""
    return MAX_CHUNK + SMALL_MESSAGE if method == f"{_FEDERATION}Upload" else SMALL_MESSAGE


class Peer:
    """What one peer uses now."""

    def __init__(self) -> None:
        self.reading = asyncio.Semaphore(_READING)
        self.reading_large = asyncio.Semaphore(_READING_LARGE)
        self.calls = 0  # that read, or wait for it


class Place:
    """A call's place among those of its peer: it may read while it has it."""

    def __init__(self, peer: Peer, reading: asyncio.Semaphore, decoding: asyncio.Semaphore) -> None:
        self._peer = peer
        self._reading = reading
        self._decoding = decoding
        self._held: list[asyncio.Semaphore] = []
        self._counted = True
        peer.calls += 1

    async def read(self) -> None:
        """Waits for the call's turn to read a message."""
        await self._take(self._reading)

    async def decode(self) -> None:
        """Waits for the call's turn to have a large message decoded and checked."""
        await self._take(self._decoding)

    def leave(self) -> None:
        """Makes room for others; may be called again."""
        self._peer.calls -= self._counted
        self._counted = False
        while self._held:
            self._held.pop().release()

    async def _take(self, semaphore: asyncio.Semaphore) -> None:
        await semaphore.acquire()
        self._held.append(semaphore)


class Limits:
    """Peers and what they use; refused calls end with RESOURCE_EXHAUSTED, upon which a site tries again."""

    def __init__(self, leading: Leading) -> None:
        self._leading = leading
        self._peers: dict[str, Peer] = {}
        self._enrollments = Rates(_ENROLLMENTS, _ENROLLMENTS_PER_S)
        self._decoding = asyncio.Semaphore(_LARGE)

    async def place(self, method: str, context: grpc.aio.ServicerContext) -> Place:
        """The call's place, to be left when it has ended at the latest; a peer that calls too often is refused."""
        name = peer_of(context)
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= _MAX_PEERS:
                self._peers = {known: other for known, other in self._peers.items() if other.calls}
            peer = self._peers[name] = Peer()
        if peer.calls >= _MAX_WAITING:
            await refuse(context, f"more than {_MAX_WAITING} calls of one certificate or address wait to be read")
        if method == f"{_FEDERATION}Enroll" and not self._enrollments.take(name):
            await refuse(context, f"one certificate or address may enroll {_ENROLLMENTS_PER_S:g} times per second")
        return Place(peer, peer.reading_large if method in _LARGE_METHODS else peer.reading, self._decoding)

    def check_large(self, method: str, message: bytes, context: grpc.aio.ServicerContext) -> None:
        """Checks a message that is longer than the method's `usual_length`, before it is decoded.

        Raises RequestError when the method takes no message of that length; of a method that may SessionLost when the
        caller's session is not valid, NotLeading where sessions are unknown.
        """
        limit = usual_length(method)
        if method in _LARGE_METHODS:
            limit = self._longest(method, message, context)
        if len(message) > limit:
            name = method.rpartition("/")[2]
            raise RequestError(f"a message of {len(message)} bytes is too long: {name} takes up to {limit}")

    def _longest(self, method: str, message: bytes, context: grpc.aio.ServicerContext) -> int:
        """Bytes that a site with a valid session may send."""
        coordinator = self._leading()
        session = message[2:66].decode("ascii", "replace") if message.startswith(_SESSION) else ""
        site, state = coordinator.presence.named(session, key_of(context)), coordinator.state
        if method.endswith("/Register"):
            # Sites have the same tensors, in the base64 of the state.
            known = len(state.manifest) * 3 // 4
            return min(known + 2 * MAX_CONFIG_BYTES, MAX_MESSAGE) if known else MAX_MESSAGE
        return min(SMALL_MESSAGE + max(kind.result_limit(state, site) for kind in TASK_KINDS.values()), MAX_MESSAGE)


async def refuse(context: grpc.aio.ServicerContext, reason: str) -> None:
    """Ends a call that may be made again later; raises always."""
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{reason}; try again later")
