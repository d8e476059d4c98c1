"""The chunks of uploads and downloads as wire messages, made and read without a copy by protobuf.

A chunk is nearly all of its message: one tag, one length, the bytes. Going through the generated classes copies a
megabyte twice more on either side, on the one thread that serves all sites. What is made here is what they would make;
what they could read and this module does not know by its first bytes is left to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedhds.v2 import transfer_pb2

# Bytes. Every call has its cost, so that a chunk is large where few sites transfer; where many do, it is small, as each
# of them costs the coordinator a few chunks of memory.
MAX_CHUNK, MIN_CHUNK = 1 << 20, 1 << 16
_ROOM = 8 << 20
_LENGTH_DELIMITED = 2
_UPLOAD_TAG = transfer_pb2.UploadRequest.CHUNK_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_DOWNLOAD_TAG = transfer_pb2.DownloadResponse.CHUNK_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


def smaller(size: int, breaks: int) -> int:
    """Bytes of a chunk on a link that has broken so often in this transfer: what does not arrive whole comes again."""
    return max(min(size, MAX_CHUNK) >> min(breaks, 10), min(size, MIN_CHUNK))


def chunk_size(transfers: int) -> int:
    """Bytes of a chunk while so many sites transfer: a power of two, smaller the more they are."""
    share = _ROOM // max(transfers, 1)
    return min(max(1 << share.bit_length() >> 1, MIN_CHUNK), MAX_CHUNK)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The bytes of one message; a view into it."""

    chunk: memoryview


def upload_message(chunk: bytes) -> bytes:
    """`UploadRequest(chunk=chunk)` on the wire."""
    return _message(_UPLOAD_TAG, chunk)


def download_message(chunk: bytes) -> bytes:
    """`DownloadResponse(chunk=chunk)` on the wire."""
    return _message(_DOWNLOAD_TAG, chunk)


def read_upload(message: bytes) -> Chunk | transfer_pb2.UploadRequest:
    """Reads an UploadRequest; raises google.protobuf.message.DecodeError for what is none."""
    return _chunk(_UPLOAD_TAG, message) or transfer_pb2.UploadRequest.FromString(message)


def read_download(message: bytes) -> Chunk | transfer_pb2.DownloadResponse:
    """Reads a DownloadResponse; raises google.protobuf.message.DecodeError for what is none."""
    return _chunk(_DOWNLOAD_TAG, message) or transfer_pb2.DownloadResponse.FromString(message)


def _message(tag: int, chunk: bytes) -> bytes:
    head, length = bytearray([tag]), len(chunk)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, chunk))


def _chunk(tag: int, message: bytes) -> Chunk | None:
    """The chunk of a message that consists of one and nothing else."""
    if not message or message[0] != tag:
        return None
    length = 0
    # Four bytes of length: more than any message may have.
    for at, byte in enumerate(message[1:5]):
        length |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            begin = at + 2
            return Chunk(memoryview(message)[begin:]) if begin + length == len(message) else None
    return None
