"""Calls of protocol 1, as raw bytes over a real port: all are refused with the version to install."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fedhds import __version__
from tests.support.host import Host, enroll, start, task_of

# What fedhds 0.2 sends to enroll: the site "a", which speaks version 1.
ENROLL = b"\x0a\x01a\x12\x01\x01"


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = await start(tmp_path)
    yield made
    await made.stop()


@pytest.mark.parametrize("request_bytes", [ENROLL, b"", b"\xff\xff\xff"])
@pytest.mark.parametrize(
    "method",
    [
        "Federation/Enroll",
        "Federation/Upload",
        "Federation/Download",
        "Federation/Nothing",
        "Operations/GetStatus",
    ],
)
async def test_a_call_of_protocol_1_is_told_which_version_to_install(
    host: Host, method: str, request_bytes: bytes
) -> None:
    channel, name = host.channel, f"/fedhds.v1.{method}"
    for call in (
        channel.unary_unary(name)(request_bytes, timeout=20),
        channel.stream_unary(name)(iter([request_bytes, request_bytes]), timeout=20),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = caught.value
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details() == (
            f"this coordinator runs fedhds {__version__} and speaks protocol 2, this program protocol 1; "
            f"install fedhds {__version__} here"
        )
        # The class by which those versions know that trying again does not help.
        assert ("fedhds-error", "EnrolmentRefused") in tuple(error.trailing_metadata() or ())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [answer async for answer in channel.unary_stream(name)(request_bytes, timeout=20)]
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    # Nobody enrolled, and sites of this version go on.
    assert not host.coordinator.state.sites
    assert (await task_of(host, await enroll(host))).task.id == "train/1/a"


async def test_services_of_other_names_are_no_protocol_1(host: Host) -> None:
    for name in ("/fedhds.v1.Other/Enroll", "/fedhds.v10.Federation/Enroll", "/fedhds.v3.Federation/Enroll"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await host.channel.unary_unary(name)(ENROLL, timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
