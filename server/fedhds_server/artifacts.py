"""Blobs named by their digest in a local folder: uploads that resume, durable before they are acknowledged."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedhds.adapter import Artifact
from fedhds.errors import ArtifactError, StorageError

_ADVICE = {
    errno.ENOSPC: "the disk is full; make room there",
    errno.EDQUOT: "the disk quota is used up; make room there",
    errno.EROFS: "the file system is read-only; mount it writable",
    errno.EACCES: "permission is denied; give this user the right to write there",
}


class ArtifactStore:
    """Files `<digest>` (complete, hashed, durable) and `<digest>.part` (an upload that has not ended).

    Safe to use from several threads. Raises StorageError when the folder cannot be written, ArtifactError when the
    bytes are not what was announced.
    """

    def __init__(self, folder: Path, *, largest_upload: int) -> None:
        self._folder = folder
        self._largest_upload = largest_upload
        # One lock for all: it is held for one chunk's write at a time, and a digest's writers must take turns.
        self._lock = threading.Lock()
        with self._guarded():
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, artifact: Artifact) -> Path:
        """Where the complete artifact lies or will lie."""
        return self._folder / artifact.digest

    def has(self, artifact: Artifact) -> bool:
        """Whether the artifact is complete and durable."""
        # One look: between two, another thread may delete it.
        with self._guarded(), suppress(FileNotFoundError):
            return self.path(artifact).stat().st_size == artifact.size
        return False

    def scratch(self, name: str) -> Path:
        """A path in the same file system for a file that `adopt` will take."""
        return self._folder / f"{name}.scratch"

    def received(self, artifact: Artifact) -> int:
        """Bytes held of an upload; the artifact's size when it is complete."""
        self._check(artifact)
        with self._lock, self._guarded():
            if self.has(artifact):
                return artifact.size
            part = self._part(artifact)
            return min(part.stat().st_size, artifact.size) if part.is_file() else 0

    def append(self, artifact: Artifact, offset: int, chunk: bytes) -> None:
        """Writes `chunk` at `offset` of an upload; bytes that are held already may come again."""
        self._check(artifact)
        if offset + len(chunk) > artifact.size:
            raise ArtifactError(f"the upload is longer than the {artifact.size} bytes that were announced")
        with self._lock, self._guarded():
            if self.has(artifact):
                return
            descriptor = os.open(self._part(artifact), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                held = os.fstat(descriptor).st_size
                if offset > held:
                    raise ArtifactError(
                        f"the upload goes on at byte {offset}, only {held} are here; ask where it stands"
                    )
                written = 0
                while written < len(chunk):
                    written += os.pwrite(descriptor, memoryview(chunk)[written:], offset + written)
            finally:
                os.close(descriptor)

    def finish(self, artifact: Artifact) -> None:
        """Checks an upload's size and digest and makes it durable; a wrong one is deleted."""
        self._check(artifact)
        with self._lock, self._guarded():
            if self.has(artifact):
                return
            part = self._part(artifact)
            if not part.is_file():
                raise ArtifactError("nothing of this artifact has been uploaded")
            found = Artifact.of_file(part)
            if found.size < artifact.size:
                raise ArtifactError(f"the upload ended after {found.size} of {artifact.size} bytes; go on there")
            if found != artifact:
                part.unlink()
                raise ArtifactError("the uploaded bytes have another digest than announced; send them anew")
            self._place(part, artifact)

    def adopt(self, path: Path, artifact: Artifact) -> None:
        """Moves a local file in, whose reference is known to be right."""
        with self._lock, self._guarded():
            self._place(path, artifact)

    def open_chunks(self, artifact: Artifact, offset: int, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        """The bytes from `offset` on; raises ArtifactError for an artifact that is not here or ends before `offset`."""
        if not self.has(artifact):
            raise ArtifactError(f"there is no artifact {artifact.digest[:12]}")
        if offset > artifact.size:
            raise ArtifactError(f"the download goes on at byte {offset} of {artifact.size}; fetch it anew")
        with self._guarded(), self.path(artifact).open("rb") as file:
            file.seek(offset)
            while chunk := file.read(chunk_size):
                yield chunk

    def delete(self, artifact: Artifact) -> None:
        """Removes an artifact and what is held of its upload; nothing happens when there is neither."""
        with self._lock, self._guarded():
            self.path(artifact).unlink(missing_ok=True)
            self._part(artifact).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str]) -> None:
        """Removes all complete artifacts but those whose digests are in `keep`, and forgotten scratch files.

        Parts of uploads stay: their senders may go on.
        """
        with self._lock, self._guarded():
            for path in self._folder.iterdir():
                if path.name not in keep and path.suffix != ".part":
                    path.unlink()

    def _part(self, artifact: Artifact) -> Path:
        return self._folder / f"{artifact.digest}.part"

    def _check(self, artifact: Artifact) -> None:
        if not 0 < artifact.size <= self._largest_upload:
            raise ArtifactError(f"an artifact of {artifact.size} bytes is beyond 1 to {self._largest_upload}")

    def _place(self, path: Path, artifact: Artifact) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(self.path(artifact))
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
            raise StorageError(f"cannot use the artifact folder {self._folder}: {advice}") from error
