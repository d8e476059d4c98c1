"""The baseline of every strategy: a uniform draw from the rows of all sites."""

from __future__ import annotations

from typing import Literal

from fedhds.spec.strategies.base import StrategySpec


class RandomSpec(StrategySpec):
    """As many rows as the budget allows, drawn uniformly."""

    summary = "a uniform draw from the rows of all sites"
    shared_space = False
    privacy_unit = None
    pick_change = "none"
    coreset_kind = "random"

    name: Literal["random"] = "random"
