"""References to files: the digest and size of what they hold, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedhds.errors import AdapterError
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import transfer_pb2


def test_a_reference_is_the_digest_and_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    artifact = Artifact.of_file(path)
    assert artifact == Artifact(hashlib.sha256(b"abc" * 100_000).hexdigest(), 300_000)
    assert Artifact.from_proto(artifact.to_proto()) == artifact


@pytest.mark.parametrize(
    "digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 63 + "\n", "٣" * 64, "/" + "a" * 63, "../" * 21 + "a"]
)
def test_a_reference_whose_digest_is_none_is_refused(digest: str) -> None:
    with pytest.raises(AdapterError, match="64 lower-case"):
        Artifact.from_proto(transfer_pb2.ArtifactRef(digest=digest, size=1))
