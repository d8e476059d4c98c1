"""Runs a site's console script, which stands still in its second upload: `standing_still.py SCRIPT FLAG...`."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedhds.tensors.artifact import Artifact
    from fedhds_client.rpc_client import CoordinatorClient

# Small against the adapter of this run, so that an upload has a middle.
_CHUNK_BYTES = 256


def main() -> None:
    """Puts what stands still in the program's way, then runs it."""
    from fedhds.transfer import chunks
    from fedhds_client.rpc_client import CoordinatorClient

    upload, message = CoordinatorClient.upload, chunks.upload_message
    uploads = sent = size = 0

    async def counted_upload(
        self: CoordinatorClient, session: str, path: Path, artifact: Artifact, *further: Any
    ) -> None:
        nonlocal uploads, sent, size
        uploads, sent, size = uploads + 1, 0, artifact.size
        ask = self.federation.GetUpload

        async def asked(*arguments: Any, **options: Any) -> Any:
            answer = await ask(*arguments, **options)
            answer.chunk_size = _CHUNK_BYTES
            return answer

        self.federation.GetUpload = asked
        await upload(self, session, path, artifact, *further)

    def counted_message(chunk: bytes) -> bytes:
        nonlocal sent
        while uploads == 2 and sent > size / 2:
            time.sleep(1)
        sent += len(chunk)
        return message(chunk)

    chunks.upload_message = counted_message
    CoordinatorClient.upload = counted_upload  # type: ignore[assignment, method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
