"""Registering with the coordinator, and sending what its first adapter needs from a site's base model."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import FedhdsError, StorageError, TaskError
from fedhds.runtime.files import make_folder
from fedhds.v2 import federation_pb2 as pb

if TYPE_CHECKING:
    from fedhds_client.executor import TaskExecutor
    from fedhds_client.rpc_client import CoordinatorClient
    from fedhds_client.site import Site

logger = logging.getLogger(__name__)

# One is usual; a coordinator that takes over may have lost what it was sent.
_MAX_SENDS = 3


async def register(
    client: CoordinatorClient, executor: TaskExecutor, site: Site, request: pb.RegisterRequest, folder: Path
) -> None:
    """Registers a site; while nobody has sent the first values that the base model gives, sends them.

    `request` has all but the held-out rows. The values are in `folder` meanwhile. Raises FedhdsError when the
    coordinator does not take them, StorageError when there is no room for them.
    """
    request.evaluates = site.evaluates
    request.evaluation_rows = len(site.held_out) if site.held_out else 0
    request.validation_rows = len(site.validation) if site.validation else 0
    answer = await client.call(client.federation.Register, request)
    path = folder / "first-values.safetensors"
    sends = 0
    while answer.first_values_needed:
        sends += 1
        if sends > _MAX_SENDS:
            raise FedhdsError("the coordinator asks for the adapter's first values again and again; tell its operator")
        try:
            make_folder(folder, private=True)
            artifact = await asyncio.to_thread(executor.write_first_values, path)
        except OSError as error:
            raise StorageError(f"cannot keep the first values in {folder}: {error.strerror}; make room") from error
        request.first_values.CopyFrom(artifact.to_proto())
        logger.info("sending the adapter's first values, which follow from the base model")
        # Another site may have been faster: then it takes none any more.
        with suppress(TaskError):
            await client.upload(request.session, path, artifact)
        answer = await client.call(client.federation.Register, request)
    path.unlink(missing_ok=True)
