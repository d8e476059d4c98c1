"""Features kept on a site's disk, so that no row's are taken twice under one model, adapter and feature space.

A file holds the rows of one shard under one key: a header, a keyed hash of each row's tokens, the features in the same
order, and an HMAC-SHA-256 over the key and all of it. Neither text nor tokens are on disk. The hashes need the
folder's secret, so that a file alone does not show whether a guessed row is in it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from fedhds.errors import StorageError
from fedhds.runtime.files import locked, make_folder, replace_file, replacing
from fedhds_client.features.extraction import Features

# A run needs the present adapter's features; those before it serve a site that gets an earlier step again.
_MAX_FILES = 2
_SUFFIX = ".features"
_FORMAT = b"FHDSFEA1"
# Format, dimension, rows.
_HEADER = struct.Struct("<8sIQ")
_HASH_BYTES = 32
# Read and written at a time: large against a system call, small against any shard.
_BLOCK_BYTES = 1 << 20


def cached_features(
    folder: Path,
    *,
    key: str,
    encode: Callable[[int], Sequence[int]],
    ids: Sequence[int],
    dimension: int,
    extract: Callable[[Sequence[int]], Features],
    note: Callable[[str], None],
) -> Features:
    """What `extract(ids)` gives, float32 (len(ids), dimension), computed only for rows not yet known under `key`.

    `key` names all that features depend on besides a row's tokens, which `encode(id)` gives. `extract` is asked once
    at most, for rows whose tokens all differ. `folder` belongs to one site; it is made when absent. Afterwards it
    holds exactly these rows under `key`, and the file of one other key. `note` gets what is wrong with the cache:
    damaged files are replaced, and without a usable folder all features are computed. Errors of `encode` and
    `extract` pass through and leave the cache as it was. Memory besides the result and what `extract` gives: a hash
    per row. Processes and threads may share the folder; under one key the last writer's rows stay.

    Raises ValueError when `extract` answers for other rows or another dimension.
    """
    try:
        secret = _secret(folder, note)
    except (OSError, StorageError) as error:
        note(f"features are taken without a cache: cannot use {folder} ({error})")
        return _checked(extract(ids), ids, dimension)
    hashes = [hmac.digest(secret, np.asarray(encode(row), dtype="<i8").tobytes(), "sha256") for row in ids]
    places: dict[bytes, int] = {}
    for place, row_hash in enumerate(hashes):
        places.setdefault(row_hash, place)

    file = folder / (hashlib.sha256(key.encode()).hexdigest() + _SUFFIX)
    values = np.empty((len(ids), dimension), dtype=np.float32)
    cached: set[bytes] | None = None
    try:
        cached = _read(file, _mac(secret, file), places, values)
    except FileNotFoundError:
        pass
    except OSError as error:
        note(f"cannot read the cached features in {file}: {error.strerror}; they are taken again")
    except ValueError as error:
        note(f"the cached features in {file} are of no use ({error}); they are taken again")

    missing = [place for row_hash, place in places.items() if cached is None or row_hash not in cached]
    if missing and len(missing) == len(ids):
        del values
        values = _checked(extract(ids), ids, dimension).values
    elif missing:
        rows = [ids[place] for place in missing]
        values[missing] = _checked(extract(rows), rows, dimension).values
    for place, row_hash in enumerate(hashes):
        if places[row_hash] != place:
            values[place] = values[places[row_hash]]

    try:
        with locked(folder / "lock", wait=True):
            _make_room(file)
            if cached != places.keys() or not file.exists():
                with replacing(file, private=True) as stream:
                    stream.writelines(_content(_mac(secret, file), places, values))
            # The file system's own clock is too coarse to tell which of two files was used last.
            os.utime(file, ns=(time.time_ns(),) * 2)
    except (OSError, StorageError) as error:
        note(f"cannot keep features in {file} ({error}); the next selection takes them again")
    return Features(np.asarray(ids, dtype=np.int64), values)


def _checked(features: Features, ids: Sequence[int], dimension: int) -> Features:
    """Features as they were asked for: wrong ones must not stay on disk under the names of others."""
    if features.values.shape != (len(ids), dimension) or not np.array_equal(features.ids, ids):
        raise ValueError(
            f"features of {len(ids)} rows in {dimension} dimensions were asked for; those of {len(features.ids)} rows "
            f"came, shaped {features.values.shape}"
        )
    return features


def _mac(secret: bytes, file: Path) -> hmac.HMAC:
    """Over the file's name too: a file that was copied to another key's place is not taken for that key's."""
    return hmac.new(secret, file.name.encode(), "sha256")


def _read(
    file: Path, mac: hmac.HMAC, places: Mapping[bytes, int], values: npt.NDArray[np.float32]
) -> set[bytes] | None:
    """Hashes of all rows in the file; those in `places` have their features put there in `values`.

    Read, not mapped: an error of the disk is then an exception and ends no process. Raises OSError, and ValueError
    for a damaged file: what `values` holds then means nothing.
    """
    dimension = values.shape[1]
    with file.open("rb") as stream:

        def piece(size: int) -> bytes:
            content = _exactly(stream, size)
            mac.update(content)
            return content

        version, file_dimension, rows = _HEADER.unpack(piece(_HEADER.size))
        if (version, file_dimension) != (_FORMAT, dimension):
            raise ValueError("another format or dimension")
        # Before anything of a size that a damaged header names is allocated.
        if os.fstat(stream.fileno()).st_size != _HEADER.size + rows * (_HASH_BYTES + 4 * dimension) + mac.digest_size:
            raise ValueError("another length than its header says")
        packed = piece(rows * _HASH_BYTES)
        hashes = [packed[start : start + _HASH_BYTES] for start in range(0, len(packed), _HASH_BYTES)]
        for block in _blocks(rows, dimension):
            part = np.frombuffer(piece(len(block) * 4 * dimension), dtype="<f4").reshape(len(block), dimension)
            used = [row for row in block if hashes[row] in places]
            values[[places[hashes[row]] for row in used]] = part[[row - block.start for row in used]]
        if not hmac.compare_digest(_exactly(stream, mac.digest_size), mac.digest()):
            raise ValueError("its checksum does not match")
    return set(hashes)


def _content(mac: hmac.HMAC, places: Mapping[bytes, int], values: npt.NDArray[np.float32]) -> Iterator[bytes]:
    """A file's bytes, piece by piece."""
    order, dimension = list(places.values()), values.shape[1]

    def pieces() -> Iterator[bytes]:
        yield _HEADER.pack(_FORMAT, dimension, len(order))
        yield b"".join(places)
        for block in _blocks(len(order), dimension):
            yield values[order[block.start : block.stop]].astype("<f4", copy=False).tobytes()

    for piece in pieces():
        mac.update(piece)
        yield piece
    yield mac.digest()


def _blocks(rows: int, dimension: int) -> Iterator[range]:
    step = max(1, _BLOCK_BYTES // (4 * dimension))
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise ValueError("it ends early")
    return content


def _secret(folder: Path, note: Callable[[str], None]) -> bytes:
    """The folder's secret, drawn when there is none; raises OSError or StorageError."""
    make_folder(folder, private=True)
    file = folder / "secret"
    with locked(folder / "lock", wait=True):
        secret = file.read_bytes() if file.exists() else None
        if secret is not None and len(secret) == _HASH_BYTES:
            return secret
        if secret is not None:
            note(f"the secret of the cached features in {file} is damaged; a new one is drawn")
        secret = secrets.token_bytes(_HASH_BYTES)
        replace_file(file, secret, private=True)
        return secret


def _make_room(used: Path) -> None:
    """Deletes what crashes left, and the files of all keys but the one `used` and those used last before it."""
    for partial in used.parent.glob("*.partial"):
        partial.unlink()
    others = [file for file in used.parent.glob(f"*{_SUFFIX}") if file != used]
    others.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in others[_MAX_FILES - 1 :]:
        file.unlink()
