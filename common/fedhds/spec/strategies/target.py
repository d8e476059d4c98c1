"""Targeted selection: rows that are like a few rows of a wanted task, which some site has."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fedhds.settings import parameter
from fedhds.spec.strategies.base import StrategySpec

if TYPE_CHECKING:
    from google.protobuf.message import Message


class TargetSpec(StrategySpec):
    """Sites with target rows release query vectors, all sites count their rows by similarity to them."""

    shared_space = True
    privacy_unit = "example"
    released = "means of vectors of target rows, and counts of rows by similarity to them"
    clipped_and_noised = (
        "Means of target rows were clipped to L2 norm {clip_norm:g}; they and counts of rows were noised"
    )
    compares: ClassVar[str]
    """What rows are compared by."""

    target_queries: int = parameter(
        8, "Means that a site with target rows releases, each over --min-cluster-rows rows at least.", ge=1, le=256
    )

    @property
    def request_type(self) -> type[Message]:
        from fedhds.v2.selection_pb2 import TargetQueries

        return TargetQueries

    @property
    def report_type(self) -> type[Message]:
        from fedhds.v2.selection_pb2 import TargetReport

        return TargetReport


class TargetFeaturesSpec(TargetSpec):
    """By features, as RDS+ does (arXiv 2503.01807)."""

    summary = "rows whose features are like those of rows of a wanted task"
    compares = "features"

    name: Literal["target-features"] = "target-features"


class TargetGradientsSpec(TargetSpec):
    """By gradients of the adapter, as LESS does (arXiv 2402.04333), without its optimizer state."""

    summary = "rows whose gradients are like those of rows of a wanted task"
    compares = "gradients"

    name: Literal["target-gradients"] = "target-gradients"
