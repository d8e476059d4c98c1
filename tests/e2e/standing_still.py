"""Runs a site's console script, which stands still in its second upload: `standing_still.py SCRIPT FLAG...`."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedhds.adapter import Artifact
    from fedhds_client.link import CoordinatorLink

# Small against the adapter of this run, so that an upload has a middle.
_CHUNK_BYTES = 256


def main() -> None:
    """Puts what stands still in the program's way, then runs it."""
    from fedhds import chunks
    from fedhds_client.link import CoordinatorLink

    upload, message = CoordinatorLink.upload, chunks.upload_message
    uploads = sent = size = 0

    async def counted_upload(self: CoordinatorLink, session: str, path: Path, artifact: Artifact) -> None:
        nonlocal uploads, sent, size
        uploads, sent, size = uploads + 1, 0, artifact.size
        await upload(self, session, path, artifact)

    def counted_message(chunk: bytes) -> bytes:
        nonlocal sent
        while uploads == 2 and sent > size / 2:
            time.sleep(1)
        sent += len(chunk)
        return message(chunk)

    chunks.CHUNK_SIZE = _CHUNK_BYTES
    chunks.upload_message = counted_message
    CoordinatorLink.upload = counted_upload  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
