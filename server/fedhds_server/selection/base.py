"""The interface of inter-client selection: reports in, a coreset per site out; pure, so that a crash can repeat it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import Message

from fedhds.spec import RunSpec
from fedhds.v2 import selection_pb2

# What a site adds may exceed what its rows can give by this many standard deviations of its noise.
NOISE_TAIL = 12.0
# Features have a known length, but float32 rounds.
LENGTH_SLACK = 1e-5


@dataclass(frozen=True, slots=True)
class SelectionContext:
    """What every strategy knows: declared rows per participating site, and the rows allowed over all of them.

    `budget` is None only for strategies that set it themselves (StrategySpec.auto_budget).
    """

    spec: RunSpec
    round_number: int
    rows: Mapping[str, int]
    budget: int | None
    step: int = 0
    """Steps of this selection that are done; the reports are of the step after them."""
    request: Any = None
    """The message of type `request_type` that the sites answered; None in the first step."""
    totals: Any = None
    """What the sites' reports add up to, where the strategy adds them up."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Draws for one purpose; the same whenever the selection is repeated."""
        digest = hashlib.sha256(f"{self.spec.seed}/{self.round_number}/{purpose}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))

    def rank(self, site: str) -> bytes:
        """Decides between sites that are equal otherwise: nobody can choose a name that wins every time."""
        return hashlib.sha256(f"{self.spec.seed}/{self.round_number}/{site}".encode()).digest()


@dataclass(frozen=True, slots=True)
class Report:
    """A site's report, of the strategy's `report_type`, and the task by which the site will know it again."""

    task_id: str
    message: Any


@dataclass(frozen=True, slots=True)
class Group:
    """Clusters, as (site, cluster_id), that are alike, and those of them that give rows."""

    members: tuple[tuple[str, int], ...]
    winners: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """A coreset for every site that trains; sites without one do not. `notes` and `places` are for people."""

    coresets: Mapping[str, selection_pb2.Coreset]
    groups: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()
    places: Mapping[tuple[str, int], Sequence[float]] = field(default_factory=dict)
    """Where in the plane the clusters (site, cluster_id) are, those of no group too."""


class InterClientSelection(ABC):
    """Decides which rows of which sites train.

    Implementations MUST depend on nothing but their arguments, and not on the order of sites; MUST name only sites of
    the context that have rows; and MUST NOT ask for more rows than a site declared. Messages are of the types that the
    strategy's specification names.
    """

    def check(self, spec: RunSpec, request: Any, report: Any, *, rows: int) -> str:
        """Why a report of a site with `rows` rows cannot count, given the step's `request`; empty when it can."""
        return ""

    def add(self, totals: Any, report: Any) -> tuple[Message | None, Message]:
        """Adds a report to what earlier ones of the step add up to (None: it is the first).

        Returns the new totals, and what must be kept of the report itself. Totals of None: nothing is added up. The
        result MUST NOT depend on the order of reports.
        """
        return None, report

    @abstractmethod
    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection | Message:
        """The decision, or the request of one more step for the sites that answered.

        `reports` has the sites that answered; it is empty when the strategy asks for none.
        """
