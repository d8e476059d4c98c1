"""Chunk messages: what the generated classes would make and read, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from fedhds.transfer import chunks
from fedhds.v2 import transfer_pb2

# Where the length takes a byte more.
LENGTHS = (1, 127, 128, (1 << 14) - 1, 1 << 14, chunks.MAX_CHUNK, 1 << 21)

Read = Callable[[bytes], Any]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_message_is_what_protobuf_would_make(length: int) -> None:
    chunk = bytes(range(256)) * (length // 256 + 1)
    chunk = chunk[:length]
    assert chunks.upload_message(chunk) == transfer_pb2.UploadRequest(chunk=chunk).SerializeToString()
    assert chunks.download_message(chunk) == transfer_pb2.DownloadResponse(chunk=chunk).SerializeToString()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_message_of_a_chunk_is_read_without_a_copy(length: int) -> None:
    for made, read in (
        (chunks.upload_message, chunks.read_upload),
        (chunks.download_message, chunks.read_download),
    ):
        message = made(bytes(length))
        found = read(message)
        assert isinstance(found, chunks.Chunk)
        assert found.chunk.obj is message
        assert found.chunk == bytes(length)


def test_a_header_is_read_by_protobuf() -> None:
    request = transfer_pb2.UploadRequest(header=transfer_pb2.UploadHeader(session="s", offset=7))
    assert chunks.read_upload(request.SerializeToString()) == request


@given(st.binary(max_size=12))
@example(b"\x12\x80\x00")
@example(b"\x12\x01a\x12\x01b")
@example(b"\x12\x02a")
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
def test_any_bytes_are_read_as_protobuf_does(message: bytes) -> None:
    for read, reference in (
        (chunks.read_upload, transfer_pb2.UploadRequest.FromString),
        (chunks.read_download, transfer_pb2.DownloadResponse.FromString),
    ):
        assert outcome(read, message) == outcome(reference, message)


def outcome(read: Read, message: bytes) -> bytes | None:
    """The chunk that is read, or None for a message that is none."""
    try:
        return bytes(read(message).chunk)
    except DecodeError:
        return None


@given(st.integers(0, 10**6))
def test_chunks_of_all_sites_together_have_bounded_room(transfers: int) -> None:
    size = chunks.chunk_size(transfers)
    assert chunks.MIN_CHUNK <= size <= chunks.MAX_CHUNK
    assert size.bit_count() == 1
    assert size * transfers <= 16 << 20 or size == chunks.MIN_CHUNK
    assert size >= chunks.chunk_size(transfers + 1)


@given(st.integers(1, 2**32 - 1), st.integers(0, 1000))
def test_chunks_get_smaller_when_links_break_but_never_tiny(size: int, breaks: int) -> None:
    first = chunks.smaller(size, 0)
    assert min(size, chunks.MIN_CHUNK) <= chunks.smaller(size, breaks) <= first <= chunks.MAX_CHUNK
    assert breaks < 5 or chunks.smaller(size, breaks) == min(size, chunks.MIN_CHUNK)
