"""Messages that are too long for a call at the site: requests that are downloaded, results that are uploaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.any_pb2 import Any

from fedhds.errors import StorageError, TaskError
from fedhds.long_messages import artifact_of, long_message
from fedhds.runtime.files import make_folder, replace_file
from fedhds.tensors.artifact import Artifact
from fedhds_client.rpc_client import CoordinatorClient

# A quarter of a million centers in the default 256 dimensions; beyond it, a coordinator only fills the site's memory.
MAX_REQUEST = 256 << 20


@dataclass(frozen=True)
class LongResult:
    """A result on the site's disk, to be uploaded."""

    path: Path
    artifact: Artifact


async def fetch_request(
    client: CoordinatorClient, session: str, request: Any, folder: Path, progress: Callable[[float], None]
) -> Any:
    """The message that a task's request stands for, or the request itself.

    Raises TaskError for one that is larger than any that a run needs, StorageError, and what a download raises.
    """
    artifact = artifact_of(request)
    if artifact is None:
        return request
    if artifact.size > MAX_REQUEST:
        raise TaskError(f"the task's request has {artifact.size} bytes, and this site takes {MAX_REQUEST} at most")
    path = folder / f"request-{artifact.digest[:32]}"
    try:
        make_folder(folder, private=True)
        await client.download(session, artifact, path, progress)
        content = await asyncio.to_thread(path.read_bytes)
        path.unlink()
    except OSError as error:
        raise StorageError(f"cannot keep a task's request in {folder}: {error.strerror}; make room there") from error
    return long_message(content)


def keep_result(result: Any, folder: Path) -> LongResult:
    """Writes a result to `folder`, from where it is uploaded; raises StorageError."""
    path = folder / "result"
    try:
        make_folder(folder, private=True)
        replace_file(path, result.SerializeToString(deterministic=True), private=True)
    except OSError as error:
        raise StorageError(f"cannot keep a task's result in {folder}: {error.strerror}; make room there") from error
    return LongResult(path, Artifact.of_file(path))
