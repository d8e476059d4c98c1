"""The exceptions of fedhds: everything that is raised on purpose, so that callers can tell it from a bug.

FedhdsError
├── UsageError              a person's mistake, known before any work: a flag, a file, a folder
│   ├── SettingsError       a flag, an environment variable or a line of the YAML file
│   ├── DataError           a row or a file of instruction data
│   └── ModelError          a base model or tokenizer that cannot be used
├── ArtifactError           bytes that are not what their digest, size or manifest says
│   └── AdapterError        adapter tensors that do not fit the manifest or are not finite
├── RequestError            a request that is no message of the protocol, or says what no run can mean
├── EnrolmentRefused        the coordinator will not take this site (wrong base model, version, policy)
│   ├── NameInUse           another live process, or another key, holds the site's name
│   └── Evicted             an operator excluded this site from the run
├── NotPermitted            the caller may not change the run
├── RunOver                 the run has ended and cannot be changed
├── SessionLost             the session is unknown, superseded or expired; enrol again
├── TaskError               a request about a task that is not this site's, or no longer wanted
├── PrivacyError            a release that the site's own privacy policy forbids
├── NotLeading              another coordinator leads the run
├── CoordinatorUnreachable  no answer from the coordinator for longer than the patience
└── StorageError            the run folder, the state database or the artifact store cannot be read or written
    └── DamagedArtifact     an artifact that was acknowledged is gone, or holds other bytes now
"""

from __future__ import annotations

from pathlib import Path


class FedhdsError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one message for a person, with what to do."""


class UsageError(FedhdsError):
    """A mistake in what a person asked for; the daemons print it and exit with status 2."""


class SettingsError(UsageError):
    """A setting is missing, malformed or contradicts another; `setting` names the flag."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting


class DataError(UsageError):
    """A file or row of instruction data cannot be used; `line` counts from 1 (None: the file as a whole)."""

    def __init__(self, path: Path | str, reason: str, line: int | None = None) -> None:
        where = f"{path}" if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {reason}")
        self.path = Path(path)
        self.line = line
        self.reason = reason


class ModelError(UsageError):
    """A base model or its tokenizer cannot be found, loaded or used."""


class ArtifactError(FedhdsError):
    """Bytes do not match the digest, size or manifest that came with them."""


class AdapterError(ArtifactError):
    """Adapter tensors do not fit the run's manifest, or hold values that are not finite."""


class RequestError(FedhdsError):
    """A request is no message of the protocol, or says what no run can mean."""


class EnrolmentRefused(FedhdsError):
    """The coordinator refuses this site for good: another base model, protocol version, name or certificate."""


class NameInUse(EnrolmentRefused):
    """The site's name is held by another live process (without TLS) or by another key (with TLS)."""


class Evicted(EnrolmentRefused):
    """An operator excluded this site from the run."""


class NotPermitted(FedhdsError):
    """The caller may not change the run."""


class RunOver(FedhdsError):
    """The run has ended and cannot be changed."""


class SessionLost(FedhdsError):
    """The session is unknown, expired or was taken over by another process of the same site."""


class TaskError(FedhdsError):
    """A request names a task that does not exist, is another site's or is no longer wanted."""


class PrivacyError(FedhdsError):
    """A task asks for a release that the site's own privacy policy forbids."""


class NotLeading(FedhdsError):
    """This coordinator does not lead the run (any more): it answers no calls about it and cannot save its state."""


class CoordinatorUnreachable(FedhdsError):
    """No answer from the coordinator for longer than the patience."""


class StorageError(FedhdsError):
    """The run folder, the state database or the artifact store cannot be read or written."""


class DamagedArtifact(StorageError):
    """An artifact that was complete is gone, or its bytes are no longer those of its digest."""
