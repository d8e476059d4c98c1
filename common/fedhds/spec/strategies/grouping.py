"""What strategies that form groups of rows have in common: how many groups, what each gives, and which of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedhds.settings import parameter
from fedhds.spec.amounts import MAX_COUNT
from fedhds.spec.strategies.base import StrategySpec

if TYPE_CHECKING:
    from fedhds.spec.run import RunSpec

Shares = Literal["equal", "proportional", "sqrt"]
Pick = Literal["nearest", "drawn"]


class GroupingSpec(StrategySpec):
    """Groups over all sites, each of which gives its part of the budget."""

    groups: int = parameter(
        0,
        "Groups of rows to form over all sites; 0: as many as rows are wanted, and each gives one. With noise "
        "--released-centroids is their number.",
        setting="selection_groups",
        ge=0,
        le=MAX_COUNT,
    )
    shares: Shares = parameter(
        "equal",
        "How groups divide the budget: alike, by the number of their rows, or by its square root.",
        setting="selection_shares",
    )
    pick: Pick = parameter(
        "nearest",
        "Which rows a group gives: those nearest to its center (with noise: rows that lie far apart), or drawn ones.",
        setting="selection_pick",
    )

    @property
    def regrouped(self) -> bool:
        """Whether groups give otherwise than one row each, the nearest."""
        return bool(self.groups) or self.pick == "drawn"

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        noised = spec.privacy.selection.noised
        if self.groups and noised:
            raise ValueError("selection_groups: with noise --released-centroids is their number; drop one of the two")
        if self.groups and spec.selection.budget_of(MAX_COUNT) is None:
            raise ValueError("selection_groups: groups divide a budget; set --selection-budget")
        if self.shares != "equal" and (self.privacy_unit == "client" if noised else not self.groups):
            raise ValueError(
                "selection_shares: "
                + ("with noise no sizes of groups are known" if noised else "each group gives one row")
                + ("; drop it" if noised else "; set --selection-groups below the budget")
            )
