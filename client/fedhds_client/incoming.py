"""What the coordinator says is checked here before the site acts on it: it may be faulty, or mean harm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from pydantic import ValidationError

from fedhds import __version__
from fedhds.encoding import printable
from fedhds.errors import EnrollmentRefused, FedhdsError, TaskError
from fedhds.spec import RunSpec
from fedhds.v2 import federation_pb2 as pb

MessageType = TypeVar("MessageType", bound=Message)

MAX_CARD = 1 << 18
"""Characters of a model card; one of a thousand evaluated rounds has a quarter of it."""
# A specification has some 4 KB, most of it names.
_MAX_SPEC = 1 << 18
_MAX_NAME = 200
# Kind, round, step, digest and the site's name.
_MAX_TASK_ID = 1000
# Seconds; beyond them a site would send heartbeats without pause, or never hear that its task is withdrawn.
_MIN_TIMEOUT_S, _MAX_TIMEOUT_S = 0.2, 3600.0


@dataclass(frozen=True)
class Enrollment:
    """A checked answer to Enroll."""

    session: str
    run_id: str
    heartbeat_timeout_s: float
    spec: RunSpec


def enrollment(answer: pb.EnrollResponse) -> Enrollment:
    """Reads an answer to Enroll; raises EnrollmentRefused for one that this version does not know or that is none."""
    for what, name in (("session", answer.session), ("run_id", answer.run_id)):
        if not 0 < len(name) <= _MAX_NAME or not (name.isascii() and name.isprintable()):
            raise EnrollmentRefused(
                f"the coordinator's {what} is not 1 to {_MAX_NAME} ASCII characters; check --server"
            )
    if not math.isfinite(answer.heartbeat_timeout_s):
        raise EnrollmentRefused("the coordinator's heartbeat_timeout_s is no number of seconds; check --server")
    timeout_s = min(max(answer.heartbeat_timeout_s, _MIN_TIMEOUT_S), _MAX_TIMEOUT_S)
    if len(answer.spec) > _MAX_SPEC:
        raise EnrollmentRefused(
            f"the run's specification has {len(answer.spec)} characters, a site takes {_MAX_SPEC}; check --server"
        )
    try:
        spec = RunSpec.model_validate_json(answer.spec)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        reason = printable(problem["msg"].removeprefix("Value error, "))
        raise EnrollmentRefused(
            f"fedhds {__version__} cannot read the run's specification: {f'{where}: ' if where else ''}{reason}; "
            "install the coordinator's version here"
        ) from error
    return Enrollment(answer.session, answer.run_id, timeout_s, spec)


def task(message: pb.Task) -> pb.Task:
    """The same task; raises FedhdsError for one that no coordinator gives."""
    if not 0 < len(message.id) <= _MAX_TASK_ID or not message.id.isprintable() or len(message.kind) > _MAX_NAME:
        raise FedhdsError("the coordinator gave a task whose id or kind is none; check --server, and its version")
    return message


def outcome(done: pb.Done) -> tuple[str, str]:
    """How a run ended, completed, stopped or failed, and why, for people; raises FedhdsError for another end."""
    if done.outcome not in ("completed", "stopped", "failed"):
        raise FedhdsError(
            f"the coordinator says that the run ended as {printable(done.outcome, limit=32)!r}, which fedhds "
            f"{__version__} does not know; install the coordinator's version here"
        )
    return done.outcome, printable(done.message)


def model_card(text: str) -> str:
    """The model card as plain text: no control characters, no HTML and no more than `MAX_CARD` characters."""
    return printable(text, limit=MAX_CARD, keep="\n").replace("<", "&lt;")


def unpacked(request: Any, kind: type[MessageType], *, task: str) -> MessageType:
    """The request of a task of this kind; raises TaskError when it is of another type."""
    message = kind()
    if not request.Unpack(message):
        raise TaskError(
            f"the {task} task has a request of type {request.TypeName() or 'none'}, but fedhds {__version__} expects "
            f"{kind.DESCRIPTOR.full_name}; install the coordinator's version here"
        )
    return message
