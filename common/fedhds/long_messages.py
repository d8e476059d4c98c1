"""Messages that are too long for a call: they travel as artifacts, and a reference stands for them."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from fedhds.errors import RequestError
from fedhds.tensors.artifact import Artifact
from fedhds.v2.transfer_pb2 import LongMessage

# The state is saved with every change and has the open stage's request; calls have this much at once.
MAX_INLINE = 256 << 10


def artifact_of(message: Any) -> Artifact | None:
    """The artifact that a message stands for; None for one that says all itself. Raises RequestError, ArtifactError."""
    if not message.Is(LongMessage.DESCRIPTOR):
        return None
    try:
        return Artifact.from_proto(LongMessage.FromString(message.value).artifact)
    except DecodeError as error:
        raise RequestError("the reference to a long message is no message of its type") from error


def standing_for(artifact: Artifact) -> Any:
    """The message that stands for an artifact."""
    message = Any()
    message.Pack(LongMessage(artifact=artifact.to_proto()), deterministic=True)
    return message


def long_message(content: bytes) -> Any:
    """The message that an artifact holds; raises RequestError for other bytes."""
    try:
        return Any.FromString(content)
    except DecodeError as error:
        raise RequestError("the artifact of a long message holds no message") from error
