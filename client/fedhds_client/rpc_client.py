"""The gRPC side of a site: calls that are repeated until they are answered, uploads and downloads that resume."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import grpc

from fedhds.errors import ArtifactError, CoordinatorUnreachable, FedhdsError, NotLeading, StorageError
from fedhds.grpc_errors import error_of, older_coordinator
from fedhds.security.credentials import TlsFiles, channel_credentials, diagnose_failure
from fedhds.security.renewal import Renewal
from fedhds.settings import addresses
from fedhds.tensors.artifact import Artifact
from fedhds.transfer import chunks
from fedhds.transfer.background_step import BackgroundStep
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import transfer_pb2

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_SERVICE = pb.DESCRIPTOR.services_by_name["Federation"].full_name
# First and longest pause between two tries; doubling from one to the other spreads a thousand sites that lost their
# coordinator at the same instant over its first seconds back.
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 5.0
_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
# The coordinator allows pings every 5 s. A dead connection is noticed after 20 s, so that two of them in a row are not
# yet the silence (60 s by default) for which the coordinator gives a site up. Of a connection that TCP still answers
# for, as behind a relay, gRPC waits a minute for the answer to a ping.
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Pings that measure the link wait behind a transfer, at 1 Mbit/s for longer than that, and would break it. Without
    # them a download has this much under way: 35 MB/s at a round trip of 100 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
)
# For coordinators that do not say how large chunks are to be.
_DEFAULT_CHUNK_SIZE = 1 << 19
# A call that is not a long poll is answered in milliseconds; beyond this the connection is dead, even if TCP does not
# know.
_ANSWER_S = 60.0


class CoordinatorClient:
    """The way to the coordinator, shared by all sites of a process; counts the payload bytes it sends.

    `unanswered_since` is the monotonic time of the first failure since the last answer, None while there is none.

    `server` is a HOST:PORT, or several divided by commas, of which one leads and the others stand by: a call that one
    does not answer goes to the next at once. Every call is repeated while no coordinator can be reached, until
    `reconnect_timeout_s` seconds have passed without any answer; then CoordinatorUnreachable. Domain errors of the
    coordinator are raised as what they are.
    """

    def __init__(self, server: str, tls: TlsFiles | None, *, reconnect_timeout_s: float) -> None:
        self._targets = addresses(server)
        self._tls = tls
        self._renewal = Renewal(tls.paths) if tls else None
        self._former: list[grpc.aio.Channel] = []
        self._reconnect_timeout_s = reconnect_timeout_s
        self.bytes_sent = 0
        self.unanswered_since: float | None = None
        self._channels = [self._channel(target) for target in self._targets]
        self._stubs = [_stub(channel) for channel in self._channels]
        self._current = 0
        self.federation: Any = _Federation(lambda: self._stubs[self._current])

    def _channel(self, target: str) -> grpc.aio.Channel:
        if self._tls:
            return grpc.aio.secure_channel(target, channel_credentials(self._tls), options=_OPTIONS)
        return grpc.aio.insecure_channel(target, options=_OPTIONS)

    def _renew(self) -> None:
        """Opens new channels if the TLS files changed: gRPC reads them once for each.

        Calls that are under way end on the former ones, which stay until the end.
        """

        def channels() -> list[grpc.aio.Channel]:
            if self._tls:
                self._tls.check()
            return [self._channel(target) for target in self._targets]

        if self._renewal and (renewed := self._renewal.load(channels)):
            self._former += self._channels
            self._channels = renewed
            self._stubs = [_stub(channel) for channel in renewed]

    async def close(self) -> None:
        """Closes the channels."""
        for channel in (*self._former, *self._channels):
            await channel.close()

    async def call(self, method: Any, request: Any, *, wait_s: float = 0.0) -> Any:
        """One unary call; `wait_s` is how long the coordinator may hold it."""

        async def attempt() -> Any:
            self.bytes_sent += request.ByteSize()
            return await method(request, timeout=_ANSWER_S + wait_s)

        return await self._repeated(attempt, held_s=wait_s)

    async def upload(
        self, session: str, path: Path, artifact: Artifact, progress: Callable[[float], None] = lambda share: None
    ) -> None:
        """Sends a file; after a broken connection it goes on at the offset that the coordinator has.

        `progress` hears the share that is sent.
        """
        sent = 0

        async def parts(offset: int, chunk_size: int) -> AsyncIterator[bytes]:
            nonlocal sent
            header = transfer_pb2.UploadHeader(session=session, artifact=artifact.to_proto(), offset=offset)
            yield transfer_pb2.UploadRequest(header=header).SerializeToString()
            with path.open("rb") as file:
                file.seek(offset)
                reading = BackgroundStep()
                await reading.start(file.read, chunk_size)
                while chunk := await reading.ended():
                    # One chunk is read while the last one is sent.
                    await reading.start(file.read, chunk_size)
                    sent = max(sent, offset)
                    offset += len(chunk)
                    self.bytes_sent += len(chunk)
                    yield chunks.upload_message(chunk)
                    progress(offset / artifact.size)

        breaks = itertools.count()

        async def attempt() -> None:
            request = transfer_pb2.GetUploadRequest(session=session, artifact=artifact.to_proto())
            answer = await self.federation.GetUpload(request, timeout=_ANSWER_S)
            # Also when all bytes are there: the connection may have broken before they were checked and made durable.
            chunk_size = chunks.smaller(answer.chunk_size or _DEFAULT_CHUNK_SIZE, next(breaks))
            await self.federation.Upload(parts(answer.offset, chunk_size))

        await self._transferred(attempt, lambda: sent)

    async def download(
        self, session: str, artifact: Artifact, path: Path, progress: Callable[[float], None] = lambda share: None
    ) -> None:
        """Fetches an artifact to `path`, resuming a partial file beside it; the bytes are those of its digest.

        `progress` hears the share that has come.
        """
        partial = path.with_name(path.name + ".partial")
        breaks = itertools.count()

        async def attempt() -> None:
            offset = partial.stat().st_size if partial.exists() else 0
            with partial.open("ab") as file:
                if offset > artifact.size:
                    file.truncate(0)
                    offset = 0
                digest = await asyncio.to_thread(_digest_of, partial)
                request = transfer_pb2.DownloadRequest(session=session, artifact=artifact.to_proto(), offset=offset)
                request.chunk_size = chunks.smaller(chunks.MAX_CHUNK, next(breaks))
                taking, stream = BackgroundStep(), self.federation.Download(request)
                try:
                    async for message in stream:
                        offset += len(message.chunk)
                        if offset > artifact.size:
                            break
                        # One chunk is written and hashed while the next one arrives.
                        await taking.start(_take, file, digest, message.chunk)
                        progress(offset / max(artifact.size, 1))
                finally:
                    stream.cancel()
                    await taking.ended()
                if offset > artifact.size:
                    partial.unlink()
                    raise ArtifactError(
                        f"the coordinator sends more than the {artifact.size} bytes of {artifact.digest[:12]}"
                    )
                received = Artifact(digest.hexdigest(), file.tell())
            if received != artifact:
                partial.unlink()
                raise ArtifactError(f"the download of {artifact.digest[:12]} has another digest; it is fetched again")

        await self._transferred(attempt, lambda: partial.stat().st_size if partial.exists() else 0)
        partial.replace(path)

    async def _transferred(self, attempt: Callable[[], Awaitable[None]], position: Callable[[], int]) -> None:
        # Bytes that turned out wrong are gone at both ends: what was half a transfer is now made again.
        try:
            await self._repeated(attempt, position)
        except ArtifactError:
            await self._repeated(attempt, position)

    async def _repeated(
        self, attempt: Callable[[], Awaitable[Answer]], position: Callable[[], int] = int, *, held_s: float = 0.0
    ) -> Answer:
        """Neither the time for which a poll is held nor that in which a transfer's `position` grows is silence."""
        started, reached = time.monotonic(), position()
        pause, warned, tries = _FIRST_PAUSE_S, False, 0
        failures: dict[str, FedhdsError | str] = {}
        places = ", ".join(self._targets)
        while True:
            index, tries = self._current, tries + 1
            target = self._targets[index]
            try:
                answer = await attempt()
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
                if error is not None and not isinstance(error, (StorageError, NotLeading)):
                    raise error from None
                if error is None and failure.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise older_coordinator(target) from None
                if error is None and failure.code() not in _TRANSIENT and not _cut_short(failure):
                    raise FedhdsError(
                        f"the coordinator at {target} answered {failure.code().name}: {failure.details()}"
                    ) from None
                self._renew()
                self.unanswered_since = self.unanswered_since or time.monotonic()
                # A call that was cut short says nothing of the reason; an earlier one may have.
                if not (_cut_short(failure) and target in failures):
                    failures[target] = error or failure.details() or failure.code().name
            else:
                self.unanswered_since = None
                if warned:
                    logger.info("the coordinator answers again%s", f", at {target}" if len(self._targets) > 1 else "")
                return answer
            if (now_at := position()) > reached:
                reached, started, pause = now_at, time.monotonic(), _FIRST_PAUSE_S
            started, held_s = min(time.monotonic(), started + held_s), 0.0
            remaining = self._reconnect_timeout_s - (time.monotonic() - started)
            # Unless another call, which failed there too, has already moved on.
            if self._current == index:
                self._current = (index + 1) % len(self._targets)
            if remaining <= 0:
                raise CoordinatorUnreachable(
                    f"no answer from the coordinator at {places} for {self._reconnect_timeout_s:g} s: "
                    f"{await self._explained(failures)}; "
                    "check --server and that fedhds-server runs there"
                )
            if tries % len(self._targets):
                if not warned:
                    reason = await self._explained({target: failures[target]})
                    logger.info("%s: %s; trying %s", target, reason, self._targets[self._current])
                continue
            if not warned:
                reason = await self._explained(failures)
                logger.warning(
                    "cannot reach %s: %s; trying again for %.0f s",
                    places,
                    reason,
                    remaining,
                    extra={"code": CoordinatorUnreachable.code},
                )
                warned = True
            await asyncio.sleep(min(pause, max(remaining, 0.05)))
            pause = min(pause * 2, _MAX_PAUSE_S)

    async def _explained(self, failures: Mapping[str, FedhdsError | str]) -> str:
        reasons = {target: str(failure) for target, failure in failures.items()}
        for target, failure in failures.items():
            # gRPC says UNAVAILABLE for everything between a typing error and an expired certificate.
            if not isinstance(failure, FedhdsError):
                diagnosis = await asyncio.to_thread(diagnose_failure, target, self._tls, failure, 3.0)
                reasons[target] = diagnosis or reasons[target]
        if len(reasons) == 1:
            return next(iter(reasons.values()))
        return "; ".join(f"{target}: {reason}" for target, reason in reasons.items())


def _stub(channel: grpc.aio.Channel) -> Any:
    stub: Any = rpc.FederationStub(channel)
    # In place of the generated ones: chunks go past protobuf.
    stub.Upload = channel.stream_unary(
        f"/{_SERVICE}/Upload", response_deserializer=transfer_pb2.UploadResponse.FromString
    )
    stub.Download = channel.unary_stream(
        f"/{_SERVICE}/Download", transfer_pb2.DownloadRequest.SerializeToString, chunks.read_download
    )
    return stub


class _Federation:
    """The methods of the stub that is current at the instant of the call."""

    def __init__(self, current: Callable[[], Any]) -> None:
        self._current = current

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments, **options: getattr(self._current(), method)(*arguments, **options)


def _cut_short(failure: grpc.aio.AioRpcError) -> bool:
    """Whether grpcio could not send on as the call had ended: it then says this, now and then, for the status."""
    return failure.code() is grpc.StatusCode.INTERNAL and failure.details() == "Internal error from Core"


def _digest_of(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _take(file: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    file.write(chunk)
    digest.update(chunk)
