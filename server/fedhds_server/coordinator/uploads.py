"""Uploads: one of each site at a time, for its open task; what does not count is gone when the task ends."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedhds.errors import ArtifactError, TaskError
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.safetensors import file_sizes
from fedhds_server.run.events import Discard
from fedhds_server.run.state import RunState
from fedhds_server.workflows import TASK_KINDS

if TYPE_CHECKING:
    from fedhds_server.coordinator.coordinator import Coordinator


def owner_of(site: str) -> str:
    """What the artifact store knows a site's uploads by: 32 hexadecimal digits."""
    return hashlib.sha256(site.encode()).hexdigest()[:32]


def uploading_sites(state: RunState) -> set[str]:
    """Sites with an open task whose result names an upload, and those that may send the first values."""
    sites = {task.site for task in state.tasks.values() if TASK_KINDS[task.kind].upload_sizes(state, task)}
    return sites | {name for name in state.sites if first_value_sizes(state, name)}


def first_value_sizes(state: RunState, site: str) -> range:
    """Sizes that an upload of the adapter's first values may have, which any registered site may send until one did."""
    if not state.needs_first_values or not state.sites[site].registered or state.sites[site].excluded:
        return range(0)
    return file_sizes(state.adapter_manifest.from_base, "float32")


@dataclass(eq=False, slots=True)
class Upload:
    """One site's upload; it may go on while it is `open`."""

    site: str
    artifact: Artifact
    remaining: int = 0  # bytes that have not come yet
    open: bool = True


class Uploads:
    """The uploads for the open tasks; what is known here may be lost, as their bytes are in the artifact store."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._current: dict[str, Upload] = {}
        # What an earlier coordinator left for tasks that are still open.
        parts = coordinator.artifacts.parts()
        for site in uploading_sites(coordinator.state):
            if digest := parts.get(owner_of(site)):
                self._current[site] = Upload(site, Artifact(digest, 0), open=False)

    def check(self, site: str, artifact: Artifact) -> None:
        """Raises TaskError when no open task of the site takes an upload, ArtifactError for a size that none has."""
        state = self._coordinator.state
        own = [task for task in state.tasks.values() if task.site == site]
        sizes = [taken for task in own if (taken := TASK_KINDS[task.kind].upload_sizes(state, task))]
        sizes += [taken for taken in [first_value_sizes(state, site)] if taken]
        if not sizes:
            raise TaskError("no open task of this site takes an upload; ask for the next task")
        if not any(artifact.size in taken for taken in sizes):
            expected = " or ".join(f"{taken.start} to {taken.stop - 1}" for taken in sizes)
            raise ArtifactError(f"an upload of {artifact.size} bytes is none of this task's, which has {expected}")

    async def begin(self, site: str, artifact: Artifact, offset: int) -> Upload:
        """The site's upload from now on: what it sent before under another digest is deleted.

        Raises TaskError or ArtifactError as `check` does, StorageError when the disk is too full.
        """
        self.check(site, artifact)
        before = self._current.get(site)
        upload = self._current[site] = Upload(site, artifact, max(artifact.size - offset, 0))
        if before is not None:
            before.open = False
            if before.artifact.digest != artifact.digest:
                self._drop([before])
        pending = sum(other.remaining for other in self._current.values() if other.open)
        await asyncio.to_thread(self._coordinator.artifacts.check_room, pending)
        return upload

    def refresh(self) -> None:
        """Ends the uploads of tasks that are closed; to be called when the state is saved."""
        if self._current and (ended := self._current.keys() - uploading_sites(self._coordinator.state)):
            self._drop([self._current.pop(site) for site in sorted(ended)])

    def needs(self, artifact: Artifact, owner: str = "") -> bool:
        """Whether the upload of some site, or of `owner`, for an open task has this digest."""
        uploads = [upload for upload in self._current.values() if upload.artifact.digest == artifact.digest]
        return any(not owner or owner_of(upload.site) == owner for upload in uploads)

    def _drop(self, uploads: list[Upload]) -> None:
        needed = {artifact.digest for artifact in self._coordinator.state.artifacts}
        for upload in uploads:
            upload.open, upload.remaining = False, 0
            if upload.artifact.digest not in needed:
                self._coordinator.effects.start([Discard(upload.artifact, owner_of(upload.site))])
