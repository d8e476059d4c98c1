"""Blobs named by their digest in a local folder: uploads that resume, durable before they are acknowledged."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from fedhds.errors import ArtifactError, DamagedArtifact, StorageError
from fedhds.runtime.files import sync
from fedhds.tensors.artifact import Artifact

_ADVICE = {
    errno.ENOSPC: "the disk is full; make room there",
    errno.EDQUOT: "the disk quota is used up; make room there",
    errno.EROFS: "the file system is read-only; mount it writable",
    errno.EACCES: "permission is denied; give this user the right to write there",
}
# More than threads that write at the same time.
_LOCKS = 64
# A round's sites fetch the adapter within seconds of each other: that is one check, not one for each of them.
_TRUSTED_S = 60.0
# What is younger may be an upload whose site has not said yet what it is for, or belong to a coordinator that leads.
YOUNG_S = 3600.0
# File systems end at 255 bytes.
_MAX_NAME = 200
# Free bytes that no upload takes, at most, and the share of a small disk: the state must be saved when it is full.
_RESERVE, _RESERVE_SHARE = 256 << 20, 20


class ArtifactStore:
    """Files `<digest>` (complete, hashed, durable) and `<digest>-<owner>.part` (an upload that has not ended).

    Every sender is an owner with parts of its own, so that nobody's bytes get among another's.

    This is the local folder. A store elsewhere overrides what concerns complete artifacts, and MUST keep to this: an
    artifact is complete (`has`) only when its bytes were hashed and are durable; every coordinator that opens the store
    MUST find all complete artifacts; `verified` MUST NOT give other bytes than those of the digest. What has not ended
    may be lost with this machine. Safe to use from several threads. Raises StorageError when the store cannot be used,
    ArtifactError when bytes are not what was announced.
    """

    def __init__(self, folder: Path, *, largest_upload: int) -> None:
        self._folder = folder
        self._largest_upload = largest_upload
        # A digest's writers must take turns; others need not wait while it is written, hashed or made durable.
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))
        # By digest: the file whose bytes were found right (inode, size, time of its last change), and when.
        self._trusted: dict[str, tuple[tuple[int, int, int], float]] = {}
        # Two coordinators that share a folder must not write the same file.
        self._process = secrets.token_hex(4)
        # Of uploads in progress, by part: the hash of their first bytes, and how many those are.
        self._hashed: dict[Path, tuple[hashlib._Hash, int]] = {}
        with self._guarded():
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def folder(self) -> Path:
        """The local folder; it holds uploads in progress also where complete artifacts lie elsewhere."""
        return self._folder

    def path(self, artifact: Artifact) -> Path:
        """Where this machine's copy of the complete artifact lies or will lie."""
        return self._folder / artifact.digest

    def has(self, artifact: Artifact) -> bool:
        """Whether the artifact is complete and durable."""
        return self._here(artifact)

    def verified(self, artifact: Artifact) -> Path:
        """A local file with the artifact's bytes, hashed unless that was done a minute ago and it is unchanged since.

        Raises DamagedArtifact, saying what to do, when it is gone or damaged.
        """
        path = self.path(artifact)
        with self._guarded():
            try:
                identity, now = _identity(path), time.monotonic()
                if artifact.digest in self._trusted:
                    trusted, since = self._trusted[artifact.digest]
                    if trusted == identity and now - since < _TRUSTED_S:
                        return path
                if Artifact.of_file(path) != artifact:
                    raise self._damaged(artifact, "is damaged: it holds other bytes than those of its digest")
            except FileNotFoundError:
                raise self._damaged(artifact, "is gone") from None
        self._trusted[artifact.digest] = identity, now
        return path

    def scratch(self, name: str) -> Path:
        """A path in the same file system for a file that `adopt` will take."""
        return self._folder / f"{name}-{self._process}.scratch"

    def check_room(self, size: int) -> None:
        """Raises StorageError when `size` bytes more would leave too little room for the run's state."""
        with self._guarded():
            disk = os.statvfs(self._folder)
        free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        reserve = min(_RESERVE, total // _RESERVE_SHARE)
        if free - size < reserve:
            raise StorageError(
                f"the disk of {self._folder} has {free >> 20} MiB left, of which the run's state needs "
                f"{reserve >> 20}: an upload of {size >> 20} MiB has to wait; make room there"
            )

    def received(self, artifact: Artifact, owner: str = "") -> int:
        """Bytes held of an owner's upload; the artifact's size when it is complete."""
        self._check(artifact)
        with self._lock(artifact), self._guarded():
            if self.has(artifact):
                return artifact.size
            part = self._part(artifact, owner)
            return min(part.stat().st_size, artifact.size) if part.is_file() else 0

    def append(self, artifact: Artifact, offset: int, chunk: bytes | memoryview, owner: str = "") -> None:
        """Writes `chunk` at `offset` of an owner's upload and hashes it; bytes that are held already may come again."""
        self._check(artifact)
        if offset + len(chunk) > artifact.size:
            raise ArtifactError(f"the upload is longer than the {artifact.size} bytes that were announced")
        with self._lock(artifact), self._guarded():
            if self._here(artifact):
                return
            # Gone while it is written, and for good where bytes are left out or come again: `finish` then reads them.
            part = self._part(artifact, owner)
            digest, hashed = self._hashed.pop(part, (hashlib.sha256(), 0))
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if offset > size:
                    raise ArtifactError(
                        f"the upload goes on at byte {offset}, only {size} are here; ask where it stands"
                    )
                written = 0
                while written < len(chunk):
                    written += os.pwrite(descriptor, memoryview(chunk)[written:], offset + written)
            finally:
                os.close(descriptor)
            if not offset:
                digest, hashed = hashlib.sha256(), 0
            if hashed == offset:
                digest.update(chunk)
                self._hashed[part] = digest, offset + written

    def finish(self, artifact: Artifact, owner: str = "") -> None:
        """Checks the size of an owner's upload and digest and makes it durable; a wrong one is deleted."""
        self._check(artifact)
        with self._lock(artifact), self._guarded():
            if self.has(artifact):
                return
            part = self._part(artifact, owner)
            if not part.is_file():
                raise ArtifactError("nothing of this artifact has been uploaded")
            digest, hashed = self._hashed.pop(part, (None, 0))
            size = part.stat().st_size
            uploaded = Artifact(digest.hexdigest(), size) if digest and hashed == size else Artifact.of_file(part)
            if uploaded.size < artifact.size:
                raise ArtifactError(f"the upload ended after {uploaded.size} of {artifact.size} bytes; go on there")
            if uploaded != artifact:
                part.unlink()
                raise ArtifactError("the uploaded bytes have another digest than announced; send them again")
            self._place(part, artifact)

    def adopt(self, path: Path, artifact: Artifact) -> None:
        """Moves a local file in, whose reference is known to be right."""
        with self._lock(artifact), self._guarded():
            self._place(path, artifact)

    def open_chunks(self, artifact: Artifact, offset: int, chunk_size: int) -> Iterator[bytes]:
        """The bytes from `offset` on; raises DamagedArtifact, or ArtifactError for one that ends before `offset`."""
        if offset > artifact.size:
            raise ArtifactError(f"the download goes on at byte {offset} of {artifact.size}; fetch it again")
        path = self.verified(artifact)
        with self._guarded(), path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(chunk_size):
                yield chunk

    def keep_update(self, artifact: Artifact, number: int, site: str) -> None:
        """Gives the update of `site` in round `number` a name for people, `kept_name`, that no deletion reaches."""
        kept = self._folder / kept_name(number, site)
        partial = kept.with_suffix(".partial")
        path = self.verified(artifact)
        with self._guarded():
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            partial.hardlink_to(path)
            partial.replace(kept)
            # Where both were names of one file already, the rename did nothing.
            partial.unlink(missing_ok=True)
            sync(kept.parent)

    def delete(self, artifact: Artifact) -> None:
        """Removes a complete artifact; nothing happens when there is none."""
        with self._lock(artifact), self._guarded():
            self._trusted.pop(artifact.digest, None)
            self.path(artifact).unlink(missing_ok=True)

    def delete_part(self, artifact: Artifact, owner: str = "") -> None:
        """Removes what is held of an owner's upload that has not ended; nothing happens when there is none."""
        with self._lock(artifact), self._guarded():
            part = self._part(artifact, owner)
            self._hashed.pop(part, None)
            part.unlink(missing_ok=True)

    def parts(self) -> dict[str, str]:
        """Digests of the uploads that have not ended, by owner."""
        with self._guarded():
            return {owner: digest for digest, owner in map(_named, self._folder.glob("*.part"))}

    def sweep(self, keep: Collection[str], owners: Collection[str] = (), *, over: bool = False) -> None:
        """Removes complete artifacts whose digests are not in `keep`, and scratch files, that are older than an hour.

        Parts of uploads go unless their owner, one of `owners`, may go on. When the run is `over`, complete artifacts
        go whatever their age. What `keep_update` made stays. To be called by the coordinator that leads, with the state
        that it leads from: to another, newer artifacts of the run are unknown.
        """
        with self._guarded():
            for path in self._folder.iterdir():
                part = path.suffix == ".part"
                if path.name in keep or path.is_dir() or (part and _named(path)[1] in owners):
                    continue
                with suppress(FileNotFoundError):
                    if over or part or path.stat().st_mtime < time.time() - YOUNG_S:
                        path.unlink()

    def _lock(self, artifact: Artifact) -> threading.Lock:
        return self._locks[hash(artifact.digest) % _LOCKS]

    def _here(self, artifact: Artifact) -> bool:
        # One look: between two, another thread may delete it.
        with self._guarded(), suppress(FileNotFoundError):
            return self.path(artifact).stat().st_size == artifact.size
        return False

    def _damaged(self, artifact: Artifact, what: str) -> DamagedArtifact:
        return DamagedArtifact(
            f"the artifact {self._where(artifact)} {what}; put a file of {artifact.size} bytes with that SHA-256 back, "
            "from a backup or, if it is the newest global adapter, from the checkpoint in the run folder"
        )

    def _where(self, artifact: Artifact) -> str:
        """What people know the place of the complete artifact by."""
        return str(self.path(artifact))

    def _part(self, artifact: Artifact, owner: str) -> Path:
        return self._folder / f"{artifact.digest}-{owner}.part"

    def _check(self, artifact: Artifact) -> None:
        if not 0 < artifact.size <= self._largest_upload:
            raise ArtifactError(f"an artifact of {artifact.size} bytes is beyond 1 to {self._largest_upload}")

    def _place(self, path: Path, artifact: Artifact) -> None:
        """Makes a file complete and durable that is known to hold the artifact's bytes; it is gone from `path` then."""
        sync(path)
        self._put(path, artifact)
        sync(self._folder)

    def _put(self, path: Path, artifact: Artifact) -> None:
        path.replace(self.path(artifact))
        self._trusted[artifact.digest] = _identity(self.path(artifact)), time.monotonic()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
            raise StorageError(f"cannot use the artifact folder {self._folder}: {advice}") from error


def _named(part: Path) -> tuple[str, str]:
    """Digest and owner of an upload that has not ended."""
    digest, _, owner = part.stem.partition("-")
    return digest, owner


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_ctime_ns


def kept_name(number: int, site: str) -> str:
    """`updates/round-<number>/<site>.safetensors`; what no file name may hold of the site's is escaped as in a URL."""
    name = quote(site, safe=" @")
    if len(name) > _MAX_NAME:
        name = f"{name[:_MAX_NAME]}-{hashlib.sha256(site.encode()).hexdigest()[:16]}"
    return f"updates/round-{number}/{name}.safetensors"
