"""Whatever a peer sends to whatever method, it gets a fitting status, and the run stays whole for everybody else."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedhds.tensors.artifact import Artifact
from fedhds.tensors.codecs import CODECS
from fedhds.tensors.manifest import AdapterManifest
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.transfer import chunks
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2, status_pb2
from fedhds_server.coordinator.uploads import owner_of
from fedhds_server.leadership.gate import LeaderGate
from fedhds_server.rpc import federation, grpc_server
from fedhds_server.run.state import RunState
from fedhds_server.storage.sql import SqlStore
from tests.support.host import FINGERPRINT, MANIFEST, Host, complete, enroll, send, start, task_of
from tests.support.manifests import lora_manifest

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (pb.DESCRIPTOR, status_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
FITTING = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# What only the inside of the coordinator or a library says.
INTERNALS = ("Traceback", "<class", "Error(", ".py", "google.", "sqlalchemy", "sqlite", "numpy", "pydantic", "Errno")
# Every example has a server of its own: to shrink one would take longer than a test may.
PATIENT = settings(
    max_examples=10,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# One method in `make test-fast`, every one in `make test`.
SOME_METHODS = [
    pytest.param(name, marks=[pytest.mark.slow] * (not name.endswith("Federation/CompleteTask"))) for name in METHODS
]
ROWS = 10
RESULTS = [
    f"fedhds.v2.{name}" for name in ("TrainResult", "EvaluationResult", "ClusterReport", "KMeansStats", "Coreset")
]


@pytest.fixture(autouse=True, scope="module")
def short_polls() -> Iterator[None]:
    """Whatever wait a message asks for is over soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation, "_MAX_POLL_S", 0.1)
        yield


Known = dict[str, list[Any]]
"""Values that a peer may know, by name of the field or full name of the message that they fit."""


def values(field: FieldDescriptor, known: Known) -> st.SearchStrategy[Any]:
    """Any value of a field, one that the coordinator knows about as often as not."""
    value: st.SearchStrategy[Any]
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            assert field.message_type
            any_message = field.message_type.full_name == "google.protobuf.Any"
            value = packed(known) if any_message else messages(field.message_type.full_name, known)
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            value = st.binary(max_size=100)
        case FieldDescriptor.CPPTYPE_STRING:
            value = st.text(max_size=30) | st.text("\0/.\n", max_size=300) | st.just("x" * 100_000)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            value = st.floats()
        case FieldDescriptor.CPPTYPE_FLOAT:
            value = st.floats(width=32)
        case FieldDescriptor.CPPTYPE_BOOL:
            value = st.booleans()
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_INT64 as kind:
            value = _integers(signed=True, bits=32 if kind == FieldDescriptor.CPPTYPE_INT32 else 64)
        case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64 as kind:
            value = _integers(signed=False, bits=32 if kind == FieldDescriptor.CPPTYPE_UINT32 else 64)
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type
            value = st.sampled_from([value.number for value in field.enum_type.values]) | _integers(
                signed=True, bits=32
            )
        case kind:
            raise AssertionError(f"no strategy for fields of type {kind}; add one")
    if field.name in known:
        value = st.sampled_from(known[field.name]) | value
    return value


@st.composite
def packed(draw: st.DrawFn, known: Known) -> AnyMessage:
    """Any result, under its own type's name or under another, or bytes that are no message."""
    wrapped = AnyMessage()
    if draw(st.booleans()):
        wrapped.Pack(draw(st.sampled_from(RESULTS).flatmap(lambda name: messages(name, known))))
    if draw(st.integers(0, 3)) == 0:
        urls = ["", "/", "x", "type.googleapis.com/", "a/fedhds.v2.Nothing", "a/fedhds.v2.TrainResult", "\0" * 300]
        wrapped.type_url = draw(st.sampled_from(urls))
    if draw(st.integers(0, 3)) == 0:
        wrapped.value = draw(st.binary(max_size=100))
    return wrapped


def _integers(*, signed: bool, bits: int) -> st.SearchStrategy[int]:
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return st.integers(0, 3) | st.sampled_from([least, most, most // 2, 1 << 20]) | st.integers(least, most)


@st.composite
def messages(draw: st.DrawFn, full_name: str, known: Known) -> Message:
    """Any message of a type: every field set or not, of oneofs any or none, with unknown fields now and then."""
    if full_name in known and draw(st.booleans()):
        message_known: Message = draw(st.sampled_from(known[full_name]))
        return message_known
    descriptor = pb.DESCRIPTOR.pool.FindMessageTypeByName(full_name)
    message = GetMessageClass(descriptor)()
    for field in draw(st.permutations(list(descriptor.fields))):
        if draw(st.booleans()):
            _set(draw, message, field, known)
    if draw(st.booleans()):
        # Field 99 with a varint: what a newer version may send.
        message.MergeFromString(b"\x98\x06\x01")
    return message


def _set(draw: st.DrawFn, message: Message, field: FieldDescriptor, known: Known) -> None:
    """Gives a field any value."""
    message.ClearField(field.name)
    of_messages = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    if is_map(field):
        for entry in draw(st.lists(values(field, known), max_size=4)):
            getattr(message, field.name)[entry.key].CopyFrom(entry.value)
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(values(field, known), max_size=4)))
    elif of_messages:
        getattr(message, field.name).CopyFrom(draw(values(field, known)))
    else:
        setattr(message, field.name, draw(values(field, known)))


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


@st.composite
def distorted(draw: st.DrawFn, message: Message, known: Known) -> Message:
    """A message in which one field, at any depth, has another value."""
    copy = type(message)()
    copy.CopyFrom(message)
    part: Message = copy
    while part.DESCRIPTOR.fields:
        if isinstance(part, AnyMessage) and draw(st.integers(0, 4)):
            inner = GetMessageClass(pb.DESCRIPTOR.pool.FindMessageTypeByName(part.TypeName()))()
            part.Unpack(inner)
            part.Pack(draw(distorted(inner, known)))
            return copy
        fields: list[Any] = list(part.DESCRIPTOR.fields)
        field = draw(st.sampled_from(fields))
        inside = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        value = getattr(part, field.name)
        present = len(value) if field.is_repeated else inside and part.HasField(field.name)
        if not inside or not present or not draw(st.booleans()):
            _set(draw, part, field, known)
            return copy
        if field.is_repeated:
            value = value[draw(st.sampled_from(sorted(value) if is_map(field) else range(len(value))))]
        part = value
    return copy


async def call(host: Host, method: str, *payloads: bytes) -> tuple[grpc.StatusCode, list[bytes]]:
    """Sends bytes as the messages of one call and half-closes; asserts that the status is a fitting one."""

    async def requests() -> AsyncIterator[bytes]:
        for payload in payloads:
            yield payload

    try:
        if METHODS[method].server_streaming:
            answers = [answer async for answer in host.channel.stream_stream(method)(requests(), timeout=20)]
        else:
            answers = [await host.channel.stream_unary(method)(requests(), timeout=20)]
    except grpc.aio.AioRpcError as error:
        failure = error
    else:
        return grpc.StatusCode.OK, answers
    if failure.details() == "Internal error from Core":
        # Not an answer: grpcio's client says so, now and then, where it could not send on as the call had ended.
        return await call(host, method, *payloads)
    if host.work.done():
        host.work.result()
    code, details = failure.code(), failure.details()
    assert code in FITTING, f"{method} answers {code}: {details}"
    assert details
    assert not [words for words in INTERNALS if words in details], details
    return code, []


@contextlib.asynccontextmanager
async def hosted(**fields: object) -> AsyncIterator[Host]:
    """A coordinator that must be whole afterwards, and whose run another coordinator can go on with."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        host = await start(Path(folder), **fields)
        try:
            yield host
            if host.work.done():
                host.work.result()
            await host.operations.GetStatus(status_pb2.GetStatusRequest(), timeout=20)
            # Everything that was posted before is saved with this.
            if not host.work.done():
                await host.coordinator.effects.done()
                await host.coordinator.post(lambda _: None)
            saved = SqlStore.in_folder(host.folder).load()
            assert saved is not None
            assert comparable(saved) == comparable(host.coordinator.state)
        finally:
            await host.stop()
        again = await start(Path(folder))
        try:
            await again.operations.GetStatus(status_pb2.GetStatusRequest(), timeout=20)
            assert not again.work.done() or again.coordinator.state.phase.over
        finally:
            await again.stop()


def comparable(state: RunState) -> dict[str, Any]:
    """The state without its traffic counters, which are saved with the next event."""
    content = state.model_dump()
    for site in content["sites"].values():
        del site["bytes_received"]
    return content


async def prepared(host: Host) -> Known:
    """Two sites with open tasks, one not registered, and uploads that fit the run, do not, or are incomplete."""
    sessions = [await enroll(host, name, rows=ROWS, evaluates=True) for name in "ab"]
    third = await host.federation.Enroll(pb.EnrollRequest(site="c", protocol_versions=[2]))
    tasks = [(await task_of(host, session)).task.id for session in sessions]
    uploads = [upload(host, MANIFEST, 0.5), upload(host, MANIFEST, np.nan), upload(host, OTHER, 0.5)]
    for path, artifact in uploads:
        host.artifacts.append(artifact, 0, path.read_bytes())
        host.artifacts.finish(artifact)
    half, whole = upload(host, MANIFEST, 0.25)
    host.artifacts.append(whole, 0, half.read_bytes()[:100], owner_of("a"))
    artifacts = [artifact for _, artifact in uploads] + [whole, *host.coordinator.state.adapters.values()]
    return {
        "session": [*sessions, third.session],
        "previous_session": [*sessions, third.session],
        "site": ["a", "b", "c"],
        "task_id": [*tasks, "evaluate/0/a", "train/1/a"],
        "size": [artifact.size for artifact in artifacts],
        "digest": [artifact.digest for artifact in artifacts],
        "fedhds.v2.ArtifactRef": [artifact.to_proto() for artifact in artifacts],
        "fedhds.v2.ModelFingerprint": [FINGERPRINT],
        "fedhds.v2.AdapterManifest": [MANIFEST.to_proto()],
        "protocol_versions": [2],
    }


OTHER = lora_manifest({"q.lora_A.weight": (3, 4), "q.lora_B.weight": (4, 2)})


def upload(host: Host, manifest: AdapterManifest, value: float) -> tuple[Path, Artifact]:
    path = host.folder / f"{value}-{manifest.tensors[0].shape[0]}"
    return path, write_adapter(path, manifest, lambda tensor: np.full(tensor.shape, value, np.float32), "float32")


Fields = dict[str, object]
FULL: Fields = {"selection_strategy": "full", "min_sites": 2}
RANDOM: Fields = {
    "selection_strategy": "random",
    "min_sites": 1,
    "selection_budget": "5",
    "rounds": 2,
    "selection_schedule": "per-round",
}
ALIGNED: Fields = {
    "selection_strategy": "fedhds-aligned",
    "min_sites": 2,
    "feature_dimension": 2,
    "selection_budget": "3",
}
CLUSTERS: Fields = {"selection_strategy": "fedhds", "min_sites": 2}
KMEANS: Fields = {
    "selection_strategy": "federated-kmeans",
    "min_sites": 2,
    "feature_dimension": 2,
    "selection_budget": "2",
    "kmeans_iterations": 1,
}


@pytest.mark.parametrize("method", SOME_METHODS)
@PATIENT
@given(data=st.data())
async def test_any_message(method: str, data: st.DataObject) -> None:
    fields = data.draw(st.sampled_from([FULL, CLUSTERS, KMEANS]))
    async with hosted(**fields) as host:
        known = await prepared(host)
        request = messages(METHODS[method].input_type.full_name, known)
        for _ in range(data.draw(st.integers(1, 4))):
            drawn = data.draw(st.lists(request, min_size=1, max_size=4 if METHODS[method].client_streaming else 1))
            await call(host, method, *(message.SerializeToString() for message in drawn))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [FULL, RANDOM, CLUSTERS, ALIGNED, KMEANS], ids=lambda fields: str(fields["selection_strategy"])
)
@PATIENT
@given(data=st.data())
async def test_a_run_with_a_site_whose_every_message_is_wrong(fields: Fields, data: st.DataObject) -> None:
    """The run comes to its end, and what it ends with is finite."""
    async with hosted(**fields | {"min_sites": 1}) as host:
        sessions = {"b": await enroll(host, "b", rows=ROWS, evaluates=True)}
        enrolled = await host.federation.Enroll(pb.EnrollRequest(site="a", protocol_versions=[2]))
        sessions["a"] = enrolled.session
        path, artifact = upload(host, MANIFEST, 0.5)
        right = right_messages(artifact)
        known: Known = {"fedhds.v2.ArtifactRef": [artifact.to_proto()]}
        # Drawn before the run, whose order of events is not hypothesis' to repeat.
        wrong = {kind: [data.draw(distorted(message, known)) for _ in range(3)] for kind, message in right.items()}
        said = {kind: itertools.cycle(drawn) for kind, drawn in wrong.items()}

        async def say(kind: str, task_id: str = "") -> grpc.StatusCode:
            method = {"register": "Register", "fail": "FailTask"}.get(kind, "CompleteTask")
            return (await call(host, f"/fedhds.v2.Federation/{method}", addressed(next(said[kind]), task_id)))[0]

        def addressed(message: Message, task_id: str, site: str = "a") -> bytes:
            facts = {"session": sessions[site], "task_id": task_id}
            for name in facts.keys() & message.DESCRIPTOR.fields_by_name.keys():
                setattr(message, name, facts[name])
            return message.SerializeToString()

        for _ in wrong["register"]:
            if await say("register") is grpc.StatusCode.OK:
                break
            again = pb.EnrollRequest(site="a", protocol_versions=[2], previous_session=sessions["a"])
            sessions["a"] = (await host.federation.Enroll(again)).session
        else:
            await call(host, "/fedhds.v2.Federation/Register", addressed(right["register"], ""))
        deadline = time.monotonic() + 20
        while not (state := host.coordinator.state).phase.over:
            assert time.monotonic() < deadline, state
            assert not host.work.done(), host.work
            for site in "ba":
                request = pb.NextTaskRequest(session=sessions[site], wait_s=0.02)
                answer = await host.federation.NextTask(request)
                if answer.WhichOneof("next") != "task":
                    continue
                task = answer.task
                kind = task.kind
                if kind == "train":
                    await send(host, sessions[site], path.read_bytes(), artifact)
                if kind == "select" and state.spec.selection.strategy.name == "federated-kmeans":
                    centers = selection_pb2.KMeansCenters()
                    task.request.Unpack(centers)
                    kind = "last statistics" if centers.last else "statistics"
                if site == "b":
                    payload = addressed(right[kind], task.id, site)
                    status, _ = await call(host, "/fedhds.v2.Federation/CompleteTask", payload)
                    assert status is grpc.StatusCode.OK
                elif await say(kind, task.id) is not grpc.StatusCode.OK:
                    await say("fail", task.id)
        with AdapterReader(host.artifacts.path(state.adapter), MANIFEST) as reader:
            assert all(np.isfinite(reader.tensor(tensor)).all() for tensor in MANIFEST.tensors)


def right_messages(artifact: Artifact) -> dict[str, Message]:
    """What a site with ROWS rows says."""
    cluster = selection_pb2.ClusterStats(count=ROWS, sums=[1 << 31, 1 << 30])
    nearest = selection_pb2.ClusterStats(count=ROWS, sums=[1 << 31, 1 << 30], nearest=0.5)
    centroids = [selection_pb2.Centroid(cluster_id=number, values=[number, 1.0], size=1) for number in (0, 1)]
    metrics = {"loss": pb.MetricSum(value_sum=3.0, weight=9), "rouge_l": pb.MetricSum(value_sum=2.0, weight=4)}
    results = {
        "select": selection_pb2.ClusterReport(dimension=2, centroids=centroids, unclustered=ROWS - 2),
        "statistics": selection_pb2.KMeansStats(dimension=2, clusters=[cluster]),
        "last statistics": selection_pb2.KMeansStats(dimension=2, clusters=[nearest]),
        "train": pb.TrainResult(update=artifact.to_proto(), samples=ROWS, loss=1.0),
        "evaluate": pb.EvaluationResult(rows=4, metrics=metrics),
        "validate": pb.EvaluationResult(rows=4, metrics={"loss": metrics["loss"]}),
    }
    right: dict[str, Message] = {
        "register": pb.RegisterRequest(
            fingerprint=FINGERPRINT, manifest=MANIFEST.to_proto(), rows=ROWS, evaluates=True, evaluation_rows=ROWS
        ),
        "fail": pb.FailTaskRequest(kind="E", reason="r"),
    }
    for kind, result in results.items():
        request = pb.CompleteTaskRequest()
        request.result.Pack(result)
        right[kind] = request
    return right


@pytest.mark.parametrize("method", SOME_METHODS)
@PATIENT
@given(data=st.data())
async def test_any_bytes(method: str, data: st.DataObject) -> None:
    """Noise, and messages that are cut short or have a byte changed."""
    async with hosted(**FULL) as host:
        known = await prepared(host)
        for _ in range(5):
            message = data.draw(messages(METHODS[method].input_type.full_name, known)).SerializeToString()
            where = data.draw(st.integers(0, len(message)))
            other = data.draw(st.binary(min_size=1, max_size=3))
            payload = data.draw(
                st.sampled_from([message[:where], message[:where] + other + message[where + len(other) :]])
                | st.binary(max_size=200)
            )
            await call(host, method, payload)


@pytest.mark.parametrize("method", METHODS)
async def test_calls_that_carry_nothing_or_too_much(method: str) -> None:
    async with hosted(**FULL) as host:
        await prepared(host)
        takes_nothing = method.rpartition("/")[2] in ("GetStatus", "Resume")
        assert (await call(host, method))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await call(host, method, b"\xff\xff"))[0] is grpc.StatusCode.INVALID_ARGUMENT
        # Field 99, bytes: an unknown one is skipped, were it not for the length.
        large = b"\x9a\x06" + b"\x80\x80\x80\x10" + bytes(32 << 20)
        assert (await call(host, method, large))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        empty, _ = await call(host, method, b"")
        assert (empty is grpc.StatusCode.OK) == takes_nothing


async def test_a_method_or_service_that_is_none(tmp_path: Path) -> None:
    host = await start(tmp_path)
    for name in ("/fedhds.v2.Federation/Nothing", "/nothing/Enroll"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await host.channel.unary_unary(name)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await host.stop()


async def test_health_and_reflection_answer_malformed_requests_too() -> None:
    server = grpc_server.new_server(LeaderGate().leading)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name in ("/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [answer async for answer in channel.unary_stream(name)(b"\xff")]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="none"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
    await server.stop(None)


# Sizes.


def bulky(data: st.DataObject, session: str) -> tuple[str, Message]:
    """A manifest or a report of hostile size, with the method that takes it."""
    count = data.draw(st.sampled_from([0, 1, 100, 3000, 20_000]))
    length = data.draw(st.sampled_from([0, 1, 2, 256, 5000]))
    if data.draw(st.booleans()):
        manifest = pb.AdapterManifest(config="{" * length)
        for number in range(count):
            name, shape = f"{number:06d}{'x' * (length // 10)}", [1 << 31] * (length // 300)
            manifest.tensors.add(name=name, shape=shape, role="lora_A", initial=pb.INITIAL_KIND_ZEROS)
        return "Register", pb.RegisterRequest(session=session, fingerprint=FINGERPRINT, manifest=manifest, rows=ROWS)
    report: Message
    if data.draw(st.booleans()):
        centroids = [selection_pb2.Centroid(cluster_id=n, values=[0.5] * length, size=1) for n in range(count)]
        report = selection_pb2.ClusterReport(dimension=length, centroids=centroids[: 8_000_000 // (length + 1)])
    else:
        clusters = [selection_pb2.ClusterStats(cluster_id=n, sums=[1] * length, count=1) for n in range(count)]
        report = selection_pb2.KMeansStats(dimension=length, clusters=clusters[: 4_000_000 // (length + 1)])
    request = pb.CompleteTaskRequest(session=session)
    request.result.Pack(report)
    return "CompleteTask", request


@pytest.mark.slow
@PATIENT
@given(data=st.data())
async def test_messages_of_any_size(data: st.DataObject) -> None:
    async with hosted(**data.draw(st.sampled_from([FULL, CLUSTERS, KMEANS]))) as host:
        known = await prepared(host)
        session = str(known["session"][0])
        for _ in range(3):
            method, message = bulky(data, session)
            if isinstance(message, pb.CompleteTaskRequest):
                message.task_id = data.draw(st.sampled_from(known["task_id"]))
            payload = message.SerializeToString()
            # Field 99, bytes: what a newer version may send.
            padding = data.draw(st.sampled_from([0, 1 << 16, 1 << 20, 8 << 20]))
            payload += b"\x9a\x06" + chunks.upload_message(bytes(padding))[1:]
            await call(host, f"/fedhds.v2.Federation/{method}", payload)


@PATIENT
@given(data=st.data())
async def test_updates_with_any_header(data: st.DataObject) -> None:
    sizes = CODECS["float32"].sizes(MANIFEST)
    async with hosted(**FULL) as host:
        sessions = [await enroll(host, name, rows=ROWS) for name in "ab"]
        task = (await task_of(host, sessions[0])).task
        for _ in range(3):
            length = data.draw(st.integers(0, sizes.stop) | st.sampled_from([sizes.stop, (1 << 64) - 1]))
            words = data.draw(st.sampled_from([b"[", b'{"a":', b"9", b" ", b'{"q.lora_A.weight":', b"\xff", b'"']))
            size = data.draw(st.sampled_from([sizes.start, sizes.stop - 1]) | st.integers(sizes.start, sizes.stop - 1))
            content = (struct.pack("<Q", length) + words * size)[:size]
            artifact = Artifact(hashlib.sha256(content).hexdigest(), size)
            # Once it is rejected, the task is closed and takes no upload.
            with contextlib.suppress(grpc.aio.AioRpcError):
                await send(host, sessions[0], content, artifact, chunk=1 << 16)
                assert not (await complete(host, sessions[0], task.id, artifact)).accepted
