"""What the coordinator remembers of an open round under secure aggregation: nothing that opens a single update."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fedhds.tensors.artifact import Artifact


class Member(BaseModel):
    """One site that sent keys."""

    model_config = ConfigDict(extra="forbid")

    weight: int  # in units of 2^-20
    rows: int  # that it was asked to train on
    public_key: str  # of its certificate: SubjectPublicKeyInfo, in base64


class SecureRound(BaseModel):
    """What the steps so far have fixed; it grows from step to step, and no part of it changes."""

    model_config = ConfigDict(extra="forbid")

    members: dict[str, Member]
    threshold: int
    terms: str  # their digest, in hexadecimal digits
    peers: Artifact  # the list of all keys, as every site got it
    shares: dict[str, Artifact] = Field(default_factory=dict)  # what each site sealed for the others
    survivors: list[str] = Field(default_factory=list)  # sites whose masked update is in the total
    dropped: list[str] = Field(default_factory=list)  # sites that others masked for, without an update
    total: Artifact | None = None  # the sum of the survivors' masked updates
    requests: dict[str, Artifact] = Field(default_factory=dict)  # what each site is asked to open

    @property
    def artifacts(self) -> list[Artifact]:
        """All that the round needs of the artifact store."""
        total = [self.total] if self.total else []
        return [self.peers, *self.shares.values(), *total, *self.requests.values()]
