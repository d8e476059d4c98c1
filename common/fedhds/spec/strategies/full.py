"""FedIT: every site trains on all of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedhds.spec.strategies.base import StrategySpec

if TYPE_CHECKING:
    from fedhds.spec.run import RunSpec


class FullSpec(StrategySpec):
    """All rows (Zhang et al. 2024, "Towards Building the Federated GPT")."""

    summary = "all rows (FedIT)"
    shared_space = False
    privacy_unit = None
    pick_change = "none"
    coreset_kind = "all"

    name: Literal["full"] = "full"

    def auto_budget(self, pool: int) -> int | None:
        return None

    def check(self, spec: RunSpec) -> None:
        if spec.selection.budget != "auto":
            raise ValueError(
                "selection_budget: the strategy full trains on all rows; drop the budget "
                f"{spec.selection.budget!r} or choose another strategy"
            )
