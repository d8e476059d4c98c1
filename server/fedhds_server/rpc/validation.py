"""What comes in is checked here, before it can change the run's state."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from google.protobuf.any_pb2 import Any

from fedhds.errors import AdapterError, ArtifactError, DamagedArtifact, RequestError
from fedhds.fingerprint import PARTS, is_digest
from fedhds.long_messages import artifact_of, long_message
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, values_digest
from fedhds.tensors.safetensors import AdapterDtype, AdapterReader, largest_value
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.coordinator import Coordinator
from fedhds_server.rpc.adapter_config import check_adapter_config
from fedhds_server.run.state import Task
from fedhds_server.workflows import TASK_KINDS
from fedhds_server.workflows.training import trainable_roles

logger = logging.getLogger(__name__)


def registration(request: pb.RegisterRequest, spec: RunSpec) -> tuple[dict[str, str], AdapterManifest]:
    """Fingerprint and manifest of a registering site.

    Raises RequestError for digests that are none, AdapterError for a manifest that describes no adapter of the run's
    PEFT method, one that is too large, or whose configuration says more than the run.
    """
    fingerprint = {part: str(getattr(request.fingerprint, part)) for part in PARTS}
    if broken := [part for part, digest in fingerprint.items() if digest and not is_digest(digest)]:
        raise RequestError(f"the fingerprint of the base model's {broken[0]} is not 64 hexadecimal digits")
    manifest = AdapterManifest.from_proto(request.manifest)
    spec.peft.check_manifest(manifest)
    check_adapter_config(manifest.parsed_config(), spec)
    if manifest.size > spec.aggregation.max_adapter_size << 20:
        raise AdapterError(
            f"the adapter takes {manifest.size / (1 << 20):.1f} MiB, the run allows "
            f"{spec.aggregation.max_adapter_size}; the operator can raise --max-adapter-size"
        )
    return fingerprint, manifest


async def sent_first_values(
    coordinator: Coordinator, request: pb.RegisterRequest, manifest: AdapterManifest
) -> Artifact | None:
    """The uploaded file that a registration names, with the first values of `manifest`; None when it is not here.

    Raises AdapterError, naming the tensor, when it has others.
    """
    if not request.HasField("first_values"):
        return None
    artifact, artifacts = Artifact.from_proto(request.first_values), coordinator.artifacts
    if not await asyncio.to_thread(artifacts.has, artifact):
        return None
    path = await asyncio.to_thread(artifacts.verified, artifact)
    dtype = coordinator.state.spec.aggregation.adapter_dtype
    await asyncio.to_thread(_check_first_values, path, manifest.from_base, dtype)
    return artifact


def _check_first_values(path: Path, manifest: AdapterManifest, dtype: AdapterDtype) -> None:
    with AdapterReader(path, manifest) as reader:
        for tensor in manifest.tensors:
            values = reader.tensor(tensor)
            if values_digest(values) != tensor.initial.digest:
                raise AdapterError(f"the first values of {tensor.name} are others than the manifest says")
            # Written so that NaN is refused, too.
            if not np.abs(values).max() <= largest_value(dtype):
                raise AdapterError(f"the first values of {tensor.name} are beyond what the run's {dtype} holds")


async def check_result(
    coordinator: Coordinator, task: Task, result: Any
) -> tuple[Artifact | None, tuple[str, str] | None]:
    """The durable upload that a result names, if any; and why the result cannot count: (what is wrong, why).

    Raises RequestError for a result that is not one of the task's kind, ArtifactError when the upload is not here.
    """
    kind = TASK_KINDS[task.kind]
    artifact = kind.upload_of(result)
    long = artifact is not None and artifact_of(result) is not None
    # What a long result says is known when it was read.
    rejection = None if long else kind.check(coordinator.state, task, result)
    if artifact is None:
        return None, rejection
    artifacts, state = coordinator.artifacts, coordinator.state
    if not await asyncio.to_thread(artifacts.has, artifact):
        raise ArtifactError("the update is not here; upload it before completing its task")
    if rejection:
        return artifact, rejection
    try:
        path = await asyncio.to_thread(artifacts.verified, artifact)
    except DamagedArtifact as error:
        logger.error("%s", error)
        if not coordinator.state.needs(artifact):
            await asyncio.to_thread(artifacts.delete, artifact)
        raise ArtifactError("the update was damaged where it was kept; upload it again") from error
    if long:
        async with coordinator.reading_long:
            return artifact, await asyncio.to_thread(_check_long, coordinator, task, path)
    if kind.masked:
        return artifact, None
    current = await asyncio.to_thread(artifacts.verified, state.adapter)
    spec = state.spec.aggregation
    try:
        await asyncio.to_thread(
            check_update,
            path,
            state.adapter_manifest,
            roles=trainable_roles(state, task.round_number),
            current=current,
            max_norm=spec.max_update_norm,
            dtype=spec.adapter_dtype,
        )
    except AdapterError as error:
        return artifact, ("adapter", f"the update is rejected: {error}")
    return artifact, None


def _check_long(coordinator: Coordinator, task: Task, path: Path) -> tuple[str, str] | None:
    def load(artifact: Artifact) -> bytes:
        return coordinator.artifacts.verified(artifact).read_bytes()

    try:
        result = long_message(path.read_bytes())
        return TASK_KINDS[task.kind].check_long(coordinator.state, task, result, load)
    except RequestError as error:
        return "report", f"the long result is rejected: {error}"


def named_upload(task_id: str, result: Any) -> Artifact | None:
    """The upload that the result of a closed task names, if there is one; whatever else it says no longer matters."""
    kind = TASK_KINDS.get(task_id.partition("/")[0])
    try:
        return kind.upload_of(result) if kind else None
    except (RequestError, ArtifactError):
        return None


def check_update(
    path: Path,
    manifest: AdapterManifest,
    *,
    current: Path,
    max_norm: float,
    roles: frozenset[str] | None = None,
    dtype: AdapterDtype = "float32",
) -> None:
    """Checks names, shapes, types and values of an update, and its distance from the adapter `current`.

    It must have the tensors whose roles are in `roles` (None: all), and no others. Values must be finite in the type
    `dtype` of the global adapter. The distance is the L2 norm of the difference over its tensors; a `max_norm` of 0
    allows any. Raises AdapterError, naming the tensor if there is one.
    """
    trained = manifest.only(manifest.roles if roles is None else roles)
    square, largest = 0.0, largest_value(dtype)
    with ExitStack() as stack, np.errstate(over="ignore"):
        reader = stack.enter_context(AdapterReader(path, trained, differences=True))
        base = stack.enter_context(AdapterReader(current, manifest)) if max_norm or reader.is_difference else None
        for tensor in trained.tensors:
            value = difference = reader.tensor(tensor)
            if base is not None:
                start = base.tensor(tensor)
                if not reader.is_difference:
                    difference = value - start
                else:
                    value = start + difference
                    if not np.isfinite(value).all():
                        raise AdapterError(f"{tensor.name} holds a difference that leads to values that are not finite")
                square += float(np.square(difference, dtype=np.float64).sum())
            if np.abs(value).max() > largest:
                raise AdapterError(f"{tensor.name} holds values beyond {largest:.6g}, the largest of the run's {dtype}")
    # Written so that a difference too large for a float is rejected too.
    if max_norm and not math.sqrt(square) <= max_norm:
        raise AdapterError(
            f"it is {math.sqrt(square):.4g} away from the round's adapter, beyond --max-update-norm {max_norm:.4g}"
        )
