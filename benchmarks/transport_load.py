"""Processes of the transport benchmark: sites without a model on both systems, and the baseline's server.

The baseline is what gRPC alone costs: the same bytes as client-streamed and server-streamed messages of 1 MiB without
protobuf, kept in memory, averaged by numpy; no hashing, no TLS, no validation, nothing durable. The secure
baseline also does what no transport of adapters may leave out: TLS, a SHA-256 at either end, and files, durable ones
at the server. Every process prints one JSON object per line for `benchmarks.transport`; times are CLOCK_MONOTONIC,
which all processes of a host share.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedhds import PROTOCOL_VERSIONS
from fedhds.security.credentials import TlsFiles, channel_credentials, server_credentials
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, Initial, TensorSpec
from fedhds.tensors.safetensors import write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds_client import rpc_client
from fedhds_client.rpc_client import CoordinatorClient

TENSORS = 64
FINGERPRINT = pb.ModelFingerprint(**dict.fromkeys(("weights", "config", "tokenizer", "template"), "ab" * 32))
_CHUNK = 1 << 20
# The coordinator's default.
_RANK = 8
_POLL_S = 20.0
# Channels to one address share a connection unless told otherwise; sites of other hosts could not.
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
_BASELINE_OPTIONS = (OWN_CONNECTION, ("grpc.max_receive_message_length", 4 << 20))
_HERE = "127.0.0.1:0"
_METHODS = ("/baseline/Upload", "/baseline/Download")


def manifest_of(size: int) -> AdapterManifest:
    """64 tensors that make `size` bytes of float32."""
    features = size // (4 * _RANK * TENSORS)
    first, second = Initial.uniform(1 / math.sqrt(features)), Initial.zeros()
    tensors = [
        tensor
        for n in range(TENSORS // 2)
        for tensor in (
            TensorSpec(f"layer.{n}.lora_A.weight", (_RANK, features), "lora_A", first, 0),
            TensorSpec(f"layer.{n}.lora_B.weight", (features, _RANK), "lora_B", second, 1),
        )
    ]
    return AdapterManifest(tuple(sorted(tensors, key=lambda tensor: tensor.name)), "{}")


def say(**line: Any) -> None:
    """One line for the benchmark."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def prepared(folder: Path, site: str, size: int) -> list[tuple[Path, Artifact]]:
    """Two updates of a site, which take turns, so that none is at the coordinator yet when it is sent again."""
    return [
        _written(folder / f"{site.replace('/', '-')}-{number}", size, np.random.default_rng([number, *site.encode()]))
        for number in range(2)
    ]


def _written(path: Path, size: int, random: np.random.Generator) -> tuple[Path, Artifact]:
    artifact = write_adapter(
        path, manifest_of(size), lambda spec: random.standard_normal(spec.shape, dtype=np.float32), "float32"
    )
    return path, artifact


async def enroll(client: CoordinatorClient, site: str, manifest: AdapterManifest) -> str:
    """The session of a site that brought ten rows."""
    answer = await client.call(
        client.federation.Enroll, pb.EnrollRequest(site=site, protocol_versions=PROTOCOL_VERSIONS)
    )
    registration = pb.RegisterRequest(
        session=answer.session, fingerprint=FINGERPRINT, manifest=manifest.to_proto(), rows=10
    )
    await client.call(client.federation.Register, registration)
    return str(answer.session)


async def ours(target: str, sites: list[str], folder: Path, size: int, tls: TlsFiles | None) -> None:
    """Sites that upload what they prepared, through the client's own code."""
    updates = {site: prepared(folder, site, size) for site in sites}
    # The benchmark itself bounds the waiting.
    clients = [CoordinatorClient(target, tls, reconnect_timeout_s=60) for _ in sites]
    await asyncio.gather(
        *(_site(client, site, updates[site], folder, size) for client, site in zip(clients, sites, strict=True))
    )
    await asyncio.gather(*(client.close() for client in clients))


async def _site(
    client: CoordinatorClient, site: str, updates: list[tuple[Path, Artifact]], folder: Path, size: int
) -> None:
    session = await enroll(client, site, manifest_of(size))
    adapter = folder / f"{site.replace('/', '-')}-global"
    last = 0
    while True:
        request = pb.NextTaskRequest(session=session, wait_s=_POLL_S)
        answer = await client.call(client.federation.NextTask, request, wait_s=_POLL_S)
        if answer.WhichOneof("next") == "wait":
            continue
        if answer.WhichOneof("next") == "done":
            await client.download(session, Artifact.from_proto(answer.done.adapter), adapter)
            say(site=site, round=last, at=time.monotonic())
            await client.call(client.federation.ConfirmDelivery, pb.ConfirmDeliveryRequest(session=session))
            return
        task = answer.task
        await client.download(session, Artifact.from_proto(task.adapter), adapter)
        # A task of round n comes with the adapter of the round before.
        last = task.round_number
        say(site=site, round=last - 1, at=time.monotonic())
        path, artifact = updates[last % 2]
        await client.upload(session, path, artifact)
        result = pb.CompleteTaskRequest(session=session, task_id=task.id)
        result.result.Pack(pb.TrainResult(update=artifact.to_proto(), samples=10, loss=1.0))
        answer = await client.call(client.federation.CompleteTask, result)
        if not answer.accepted:
            raise SystemExit(f"{site}: {answer.reason}")


class Baseline:
    """One round at a time: all updates, their mean, for all."""

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._updates: list[bytes] = []
        self._means: list[bytes] = []
        self.changed = threading.Condition()

    def take(self, update: bytes) -> None:
        """The last update of a round makes its mean."""
        with self.changed:
            self._updates.append(update)
            if len(self._updates) < self._clients:
                return
            total = np.zeros(len(update) // 4, np.float32)
            for each in self._updates:
                total += np.frombuffer(each, np.float32)
            total /= self._clients
            self._updates.clear()
            self._means.append(total.tobytes())
            # A call that still reads the mean before has it in hand.
            self._means[:-1] = [b""] * (len(self._means) - 1)
            self.changed.notify_all()

    def mean(self, number: int) -> bytes:
        """The mean of round `number`, from 0; blocks until it is there."""
        with self.changed:
            self.changed.wait_for(lambda: len(self._means) > number)
            return self._means[number]


def chunks(data: bytes) -> Iterator[bytes]:
    """Pieces of 1 MiB."""
    view = memoryview(data)
    return (bytes(view[at : at + _CHUNK]) for at in range(0, len(data), _CHUNK))


def collect(pieces: Iterable[bytes], path: Path | None) -> bytes:
    """The bytes of a transfer; with a path they are hashed and written as well, as they come."""
    if path is None:
        return b"".join(pieces)
    parts, digest = [], hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
            parts.append(piece)
        file.flush()
        os.fsync(file.fileno())
    return b"".join(parts)


def baseline_server_sync(clients: int, folder: Path | None, tls: TlsFiles | None) -> None:
    """The baseline with a thread per call; with a folder, the secure one."""
    baseline = Baseline(clients)

    def upload(requests: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
        baseline.take(collect(requests, folder and folder / f"{threading.get_ident()}"))
        return b""

    def download(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        return chunks(baseline.mean(int(request)))

    server = grpc.server(ThreadPoolExecutor(2 * clients), options=_BASELINE_OPTIONS)
    server.add_generic_rpc_handlers((_handlers(upload, download),))
    credentials = server_credentials(tls) if tls else None
    port = server.add_secure_port(_HERE, credentials) if credentials else server.add_insecure_port(_HERE)
    server.start()
    say(port=port)
    server.wait_for_termination()


async def baseline_server_aio(clients: int) -> None:
    """The baseline on an event loop."""
    baseline = Baseline(clients)
    means = ThreadPoolExecutor(clients)

    async def upload(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext) -> bytes:
        update = b"".join([chunk async for chunk in requests])
        await asyncio.to_thread(baseline.take, update)
        return b""

    async def download(request: bytes, _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        for chunk in chunks(await asyncio.get_running_loop().run_in_executor(means, baseline.mean, int(request))):
            yield chunk

    server = grpc.aio.server(options=_BASELINE_OPTIONS)
    server.add_generic_rpc_handlers((_handlers(upload, download),))
    port = server.add_insecure_port(_HERE)
    await server.start()
    say(port=port)
    await server.wait_for_termination()


def _handlers(upload: Any, download: Any) -> Any:
    methods = {
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
        "Download": grpc.unary_stream_rpc_method_handler(download),
    }
    return grpc.method_handlers_generic_handler("baseline", methods)


def baseline_sync(
    target: str, sites: list[str], folder: Path | None, size: int, rounds: int, tls: TlsFiles | None
) -> None:
    """Sites of the baseline, a thread each; with a folder, of the secure one."""

    def site(name: str) -> None:
        update = np.random.default_rng(len(name)).standard_normal(size // 4, dtype=np.float32).tobytes()
        path = folder and folder / name.replace("/", "-")
        secure = grpc.secure_channel(target, channel_credentials(tls), _BASELINE_OPTIONS) if tls else None
        with secure or grpc.insecure_channel(target, options=_BASELINE_OPTIONS) as channel:
            upload, download = channel.stream_unary(_METHODS[0]), channel.unary_stream(_METHODS[1])
            for number in range(rounds):
                upload(chunks(update))
                mean = collect(download(str(number).encode()), path)
                say(site=name, round=number + 1, at=time.monotonic(), bytes=len(mean))

    with ThreadPoolExecutor(len(sites)) as pool:
        list(pool.map(site, sites))


async def baseline_aio(target: str, sites: list[str], size: int, rounds: int) -> None:
    """Sites of the baseline on an event loop."""

    async def site(name: str) -> None:
        update = np.random.default_rng(len(name)).standard_normal(size // 4, dtype=np.float32).tobytes()
        async with grpc.aio.insecure_channel(target, options=_BASELINE_OPTIONS) as channel:
            upload, download = channel.stream_unary(_METHODS[0]), channel.unary_stream(_METHODS[1])
            for number in range(rounds):
                await upload(iter(chunks(update)))
                mean = b"".join([chunk async for chunk in download(str(number).encode())])
                say(site=name, round=number + 1, at=time.monotonic(), bytes=len(mean))

    await asyncio.gather(*map(site, sites))


async def idle(target: str, sites: list[str], tls: TlsFiles | None, *, own_channels: bool) -> None:
    """Sites that enroll and then wait for a task; says when each has one and ends when standard input does."""
    shared = None if own_channels else CoordinatorClient(target, tls, reconnect_timeout_s=60)
    clients = [shared or CoordinatorClient(target, tls, reconnect_timeout_s=60) for _ in sites]

    async def site(client: CoordinatorClient, name: str) -> None:
        session = await enroll(client, name, manifest_of(1 << 20))
        say(site=name, enrolled=time.time())
        while True:
            request = pb.NextTaskRequest(session=session, wait_s=_POLL_S)
            task = await client.call(client.federation.NextTask, request, wait_s=_POLL_S)
            if task.WhichOneof("next") != "wait":
                say(site=name, task=time.time())
                return

    await asyncio.gather(*(site(client, name) for client, name in zip(clients, sites, strict=True)))
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """One process; its arguments are a JSON object."""
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    # A test of the whole benchmark would meet the daemon's own connections otherwise: they are shared per process.
    rpc_client._OPTIONS = (*rpc_client._OPTIONS, OWN_CONNECTION)  # type: ignore[assignment]
    tls = TlsFiles(*map(Path, arguments["tls"])) if arguments.get("tls") else None
    match role:
        case "ours":
            asyncio.run(
                ours(arguments["target"], arguments["sites"], Path(arguments["folder"]), arguments["size"], tls)
            )
        case "idle":
            asyncio.run(idle(arguments["target"], arguments["sites"], tls, own_channels=arguments["own_channels"]))
        case "baseline-sync":
            baseline_sync(arguments["target"], arguments["sites"], None, arguments["size"], arguments["rounds"], None)
        case "secure-baseline-sync":
            folder = Path(arguments["folder"])
            baseline_sync(arguments["target"], arguments["sites"], folder, arguments["size"], arguments["rounds"], tls)
        case "baseline-aio":
            asyncio.run(baseline_aio(arguments["target"], arguments["sites"], arguments["size"], arguments["rounds"]))
        case "baseline-server-sync":
            baseline_server_sync(arguments["clients"], None, None)
        case "secure-baseline-server-sync":
            baseline_server_sync(arguments["clients"], Path(arguments["folder"]), tls)
        case "baseline-server-aio":
            asyncio.run(baseline_server_aio(arguments["clients"]))


if __name__ == "__main__":
    main()
