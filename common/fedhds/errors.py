"""The exceptions of fedhds: everything that is raised on purpose, so that callers can tell it from a bug.

FedhdsError                         FH01
├── UsageError                      FH10  a person's mistake, known before any work: a flag, a file, a folder
│   ├── SettingsError               FH11  a flag, an environment variable or a line of the YAML file
│   ├── DataError                   FH12  a row or a file of instruction data
│   └── ModelError                  FH13  a base model or tokenizer that cannot be used
├── EnrollmentRefused               FH20  the coordinator will not take this site (wrong base model, version, policy)
│   ├── NameInUse                   FH21  another live process, or another key, holds the site's name
│   └── Evicted                     FH22  an operator excluded this site from the run
├── NotPermitted                    FH23  the caller may not change the run
├── SessionLost                     FH24  the session is unknown, superseded or expired; enroll again
├── RequestError                    FH30  a request that is no message of the protocol, or says what no run can mean
├── TaskError                       FH31  a task that cannot be done here, is not this site's or no longer wanted
├── RunOver                         FH32  the run has ended and cannot be changed
├── PrivacyError                    FH33  a release that the site's own privacy policy forbids
├── PolicyError                     FH34  a run or a task that the site's policy does not allow
├── ArtifactError                   FH40  bytes that are not what their digest, size or manifest says
│   └── AdapterError                FH41  adapter tensors that do not fit the manifest or are not finite
├── StorageError                    FH50  the run folder, the state database or the artifact store cannot be used
│   └── DamagedArtifact             FH51  an artifact that was acknowledged is gone, or holds other bytes now
├── CoordinatorUnreachable          FH52  no answer from the coordinator within the reconnect timeout
├── SecureAggregationError          FH60  a step of secure aggregation that cannot be done
│   ├── PeerNotVerified             FH61  keys, shares or a signature that are not of the site that they name
│   ├── ListChanged                 FH62  a second, different list of sites for one round
│   ├── RoundReplayed               FH63  a round that is over at the site, or a step of it out of turn
│   ├── BothSharesAsked             FH64  both kinds of shares of one site
│   ├── TooFewSites                 FH65  fewer sites than secure aggregation needs
│   └── PlainUpdateAsked            FH66  an update in the clear, in a run or at a site with secure aggregation
└── NotLeading                      FH53  another coordinator leads the run

Codes stand behind messages, in logs and in docs/errors.md, and are for good: one that is given up is never used again.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from fedhds.encoding import escaped, shown

UNEXPECTED = "FH90"
"""What stands in the place of a code for everything that is not raised on purpose: a defect, or a library's error."""

_MAX_QUOTED = 300
"""Characters that messages quote of a line that a library wrote."""


class FedhdsError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one message for a person, with what to do."""

    code: ClassVar[str] = "FH01"

    @property
    def public_message(self) -> str:
        """The message as others may read it: one line, without what a library said, as that could quote data."""
        text = " ".join(str(self).split())
        cause = self.__cause__
        while cause is not None:
            if not isinstance(cause, FedhdsError):
                for line in str(cause).splitlines():
                    # As messages quote it, which may cut it short.
                    words = " ".join(line[:_MAX_QUOTED].split()).rstrip(" .")
                    text = text.replace(words, "...") if len(words) > 2 else text
            cause = cause.__cause__
        # The name of a file may have bytes that are not UTF-8, which no message of the protocol takes.
        return escaped(text)


class UsageError(FedhdsError):
    """A mistake in what a person asked for; the daemons print it and exit with status 2."""

    code = "FH10"


class SettingsError(UsageError):
    """A setting is missing, malformed or contradicts another; `setting` names the flag."""

    code = "FH11"

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting


class DataError(UsageError):
    """A file or row of instruction data cannot be used; `line` counts from 1 (None: the file as a whole)."""

    code = "FH12"

    def __init__(self, path: Path | str, reason: str, line: int | None = None, *, public_reason: str = "") -> None:
        """`public_reason` may leave the site: it names no file and quotes no row."""
        where = f"{path}" if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {reason}")
        self.path = Path(path)
        self.line = line
        self.reason = reason
        self.public_reason = public_reason

    @property
    def public_message(self) -> str:
        """Names no file and quotes no row."""
        what = "its data cannot be used" if self.line is None else f"line {self.line} of its data cannot be used"
        return f"{what}{f': {self.public_reason}' * bool(self.public_reason)}; the site's log has the details"


class ModelError(UsageError):
    """A base model or its tokenizer cannot be found, loaded or used."""

    code = "FH13"


class ArtifactError(FedhdsError):
    """Bytes do not match the digest, size or manifest that came with them."""

    code = "FH40"


class AdapterError(ArtifactError):
    """Adapter tensors do not fit the run's manifest, or hold values that are not finite."""

    code = "FH41"


class RequestError(FedhdsError):
    """A request is no message of the protocol, or says what no run can mean."""

    code = "FH30"


class EnrollmentRefused(FedhdsError):
    """The coordinator refuses this site for good: another base model, protocol version, name or certificate."""

    code = "FH20"


class NameInUse(EnrollmentRefused):
    """The site's name is held by another live process (without TLS) or by another key (with TLS)."""

    code = "FH21"


class Evicted(EnrollmentRefused):
    """An operator excluded this site from the run."""

    code = "FH22"


class NotPermitted(FedhdsError):
    """The caller may not change the run."""

    code = "FH23"


class RunOver(FedhdsError):
    """The run has ended and cannot be changed."""

    code = "FH32"


class SessionLost(FedhdsError):
    """The session is unknown, expired or was taken over by another process of the same site."""

    code = "FH24"


class TaskError(FedhdsError):
    """A task cannot be done at this site, does not exist, is another site's or is no longer wanted."""

    code = "FH31"


class PrivacyError(FedhdsError):
    """A task asks for a release that the site's own privacy policy forbids; `public` is what others may read of it."""

    code = "FH33"
    _public = ""

    def __init__(self, message: str, *, public: str = "") -> None:
        super().__init__(message)
        self._public = public

    @property
    def public_message(self) -> str:
        """Says nothing of what the site has released before."""
        return self._public or super().public_message


class PolicyError(FedhdsError):
    """A run or a task breaks a rule of the site's own policy, which the message names."""

    code = "FH34"


class NotLeading(FedhdsError):
    """This coordinator does not lead the run (any more): it answers no calls about it and cannot save its state."""

    code = "FH53"


class CoordinatorUnreachable(FedhdsError):
    """No answer from the coordinator within the reconnect timeout."""

    code = "FH52"


class StorageError(FedhdsError):
    """The run folder, the state database or the artifact store cannot be read or written."""

    code = "FH50"


class SecureAggregationError(FedhdsError):
    """A step of secure aggregation cannot be done, or is refused as it could reveal a single site's update."""

    code = "FH60"


class PeerNotVerified(SecureAggregationError):
    """Keys, shares or a signature are not of the site under whose name they stand, or not for this run and round."""

    code = "FH61"


class ListChanged(SecureAggregationError):
    """A second, different list of peers or survivors for a round in which the site has answered another one."""

    code = "FH62"


class RoundReplayed(SecureAggregationError):
    """A round that is over at the site, or a step of it out of turn."""

    code = "FH63"


class BothSharesAsked(SecureAggregationError):
    """A list would open both secrets of one site, and with them its update."""

    code = "FH64"


class TooFewSites(SecureAggregationError):
    """Fewer sites than secure aggregation needs, or one that counts for more than the run allows."""

    code = "FH65"


class PlainUpdateAsked(SecureAggregationError):
    """A run or a site has secure aggregation, and an update is asked for in the clear."""

    code = "FH66"


class DamagedArtifact(StorageError):
    """An artifact that was complete is gone, or its bytes are no longer those of its digest."""

    code = "FH51"


def code_of(error: BaseException) -> str:
    """The code of an error's class."""
    return error.code if isinstance(error, FedhdsError) else UNEXPECTED


def coded(error: FedhdsError) -> str:
    """An error as one line for a person, its code behind it."""
    return f"{shown(' '.join(str(error).splitlines()))} [{error.code}]"
