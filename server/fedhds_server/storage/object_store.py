"""Artifacts in an object store, by a URL that fsspec knows: coordinators on several machines share what is complete."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedhds.errors import DamagedArtifact, FedhdsError, SettingsError, StorageError
from fedhds.tensors.artifact import Artifact
from fedhds_server.storage import artifacts
from fedhds_server.storage.artifacts import ArtifactStore, kept_name

# What fsspec's own defaults leave unbounded, by protocol: s3fs sends ten parts of 50 MB at the same time, from memory.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 2}}


def open_artifacts(url: str, run_folder: Path, run_id: str, *, largest_upload: int) -> ArtifactStore:
    """The run's artifacts: in its folder, or below `url` under its id; raises SettingsError or StorageError.

    A `url` without a scheme is a local folder, which coordinators of one host may share.
    """
    if not url:
        return ArtifactStore(run_folder / "artifacts", largest_upload=largest_upload)
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise SettingsError(
            "--artifacts", "credentials and options do not belong into the URL; give them by the environment"
        )
    if not parts.scheme:
        return ArtifactStore(Path(url) / run_id, largest_upload=largest_upload)
    # Another folder than that of a local store: what lies in this one is in the object store.
    return RemoteArtifacts(url, run_folder / "spool", run_id, largest_upload=largest_upload)


class RemoteArtifacts(ArtifactStore):
    """Objects `<url>/<run id>/<digest>`; uploads in progress, and copies to read from, lie in a local folder.

    An artifact is complete when its object is: a put is atomic. What the local folder lacks is fetched when it is asked
    for, and checked; the copy goes when the artifact is deleted.
    """

    def __init__(self, url: str, folder: Path, run_id: str, *, largest_upload: int) -> None:
        super().__init__(folder, largest_upload=largest_upload)
        self._url = f"{url.rstrip('/')}/{run_id}"
        self._files = _file_system(url)
        with self._remote():
            self._root = f"{self._files._strip_protocol(url).rstrip('/')}/{run_id}"
            # Found out now, not when the first site has uploaded for an hour.
            probe = f"{self._root}/probe-{self._process}"
            self._files.pipe_file(probe, b"")
            self._files.rm_file(probe)

    def has(self, artifact: Artifact) -> bool:
        if self._size(artifact) == artifact.size:
            return True
        # A copy of what another coordinator has deleted since would pass for an upload that is here.
        with self._guarded():
            self.path(artifact).unlink(missing_ok=True)
        return False

    def verified(self, artifact: Artifact) -> Path:
        try:
            return super().verified(artifact)
        except DamagedArtifact:
            pass
        with self._lock(artifact):
            fetched = self._folder / f"{artifact.digest}-{self._process}.scratch"
            with self._remote(), suppress(FileNotFoundError):
                self._files.get_file(self._object(artifact), str(fetched))
            with self._guarded():
                try:
                    fetched.replace(self.path(artifact))
                except FileNotFoundError:
                    raise self._damaged(artifact, "is gone") from None
        return super().verified(artifact)

    def keep_update(self, artifact: Artifact, number: int, site: str) -> None:
        with self._remote():
            self._files.cp_file(self._object(artifact), f"{self._root}/{kept_name(number, site)}")

    def delete(self, artifact: Artifact) -> None:
        with self._remote(), suppress(FileNotFoundError):
            self._files.rm_file(self._object(artifact))
        super().delete(artifact)

    def sweep(self, keep: Collection[str], owners: Collection[str] = (), *, over: bool = False) -> None:
        super().sweep(keep, owners, over=over)
        with self._remote(), suppress(FileNotFoundError):
            for entry in self._files.ls(self._root, detail=True):
                name = entry["name"].rpartition("/")[2]
                if entry["type"] != "file" or name in keep:
                    continue
                with suppress(FileNotFoundError):
                    if over or self._files.modified(entry["name"]).timestamp() < time.time() - artifacts.YOUNG_S:
                        self._files.rm_file(entry["name"])

    def _place(self, path: Path, artifact: Artifact) -> None:
        with self._remote():
            self._files.put_file(str(path), self._object(artifact))
        if self._size(artifact) != artifact.size:
            raise StorageError(f"{self._where(artifact)} is not what was written; check the object store")
        # No need to make the copy durable: what a crash leaves of it is checked before it is read.
        self._put(path, artifact)

    def _object(self, artifact: Artifact) -> str:
        return f"{self._root}/{artifact.digest}"

    def _where(self, artifact: Artifact) -> str:
        return f"{self._url}/{artifact.digest}"

    def _size(self, artifact: Artifact) -> int:
        with self._remote(), suppress(FileNotFoundError):
            return int(self._files.info(self._object(artifact))["size"])
        return 0

    @contextmanager
    def _remote(self) -> Iterator[None]:
        try:
            yield
        except FedhdsError:
            raise
        except Exception as error:
            # Every backend has errors of its own. What they say stays out of the message: it may hold what is secret.
            raise StorageError(f"cannot use the artifact store {self._url}: {_advice(error)}") from error


def _file_system(url: str) -> Any:
    import fsspec

    protocol = urlsplit(url).scheme
    try:
        return fsspec.filesystem(
            protocol, use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(protocol, {})
        )
    except ImportError as error:
        extra = "install fedhds[s3]" if protocol == "s3" else f"install fsspec's package for {protocol}"
        raise SettingsError("--artifacts", f"{url} needs a package that is not here; {extra}") from error
    except ValueError as error:
        raise SettingsError("--artifacts", f"{protocol}:// in {url} is no protocol that fsspec knows") from error


def _advice(error: Exception) -> str:
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket; make it, or correct --artifacts"
    if isinstance(error, PermissionError) or "Credential" in kind or "Token" in kind:
        return (
            "access is denied; give credentials that may read, write, list and delete there by the environment "
            "(S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role)"
        )
    if isinstance(error, ConnectionError | TimeoutError) or "Connect" in kind or "Timeout" in kind:
        return f"it cannot be reached ({kind}); check the network and the endpoint (S3: AWS_ENDPOINT_URL)"
    return f"it answers with {kind}; check its own log"
