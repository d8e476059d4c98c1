"""References to files by their content, as they travel between sites and the coordinator."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedhds.errors import AdapterError
from fedhds.v2 import transfer_pb2


@dataclass(frozen=True, slots=True)
class Artifact:
    """Bytes named by their content: `digest` is their SHA-256 in hexadecimal, `size` their length in bytes."""

    digest: str
    size: int

    def to_proto(self) -> transfer_pb2.ArtifactRef:
        """The same reference as a wire message."""
        return transfer_pb2.ArtifactRef(digest=self.digest, size=self.size)

    @classmethod
    def from_proto(cls, message: transfer_pb2.ArtifactRef) -> Self:
        """Reads a wire message; raises AdapterError when the digest is not one."""
        if len(message.digest) != 64 or set(message.digest) - set("0123456789abcdef"):
            raise AdapterError("artifact digest is not 64 lower-case hexadecimal digits")
        return cls(message.digest, message.size)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Hashes a file."""
        with path.open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)
