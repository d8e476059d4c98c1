"""The interface of a selection strategy's specification: what coordinator, sites, docs and model card read of it.

No other code compares the names of strategies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import budget_rows

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from fedhds.spec.run import RunSpec

# The share of the paper's headline (FedHDS, arXiv 2410.10926, abstract).
AUTO_BUDGET = "1.5%"

PrivacyUnit = Literal["client", "example"]
CoresetKind = Literal["all", "random", "picks"]


class StrategySpec(Parameters):
    """Base of the strategies' parameters. Subclasses give `name` its value and set the class variables."""

    summary: ClassVar[str]
    """Which rows train, in a few words."""
    shared_space: ClassVar[bool]
    """Whether features must compare between sites."""
    privacy_unit: ClassVar[PrivacyUnit | None]
    """What noise on a site's release hides: the site's whole shard, or one row. None: sites release nothing."""
    pick_change: ClassVar[Literal["none", "one", "any"]] = "any"
    """How the coreset changes when one row of a site is left out: not at all but for that row, another row may take its
    place, or every other pick may change. DP-SGD has a guarantee in the first two cases."""
    released: ClassVar[str] = ""
    """What a site sends for selection, for the model card; empty: nothing."""
    coreset_kind: ClassVar[CoresetKind] = "picks"
    """How coresets name their rows, the field of fedhds.v2.Coreset; sites train on no others."""
    clipped_and_noised: ClassVar[str] = "Released centroids were clipped to L2 norm {clip_norm:g} and noised"
    """The model card's words for what clipping and noise did."""
    name: str = parameter(..., "Which rows train.", setting="selection_strategy")

    @property
    def request_type(self) -> type[Message] | None:
        """The message that the coordinator sends with a selection task; None: the task says enough.

        Message types are properties so that `--help` need not import protobuf.
        """
        return None

    @property
    def report_type(self) -> type[Message] | None:
        """The message that a site answers with; None: sites are not asked."""
        return None

    def auto_budget(self, pool: int) -> int | None:
        """Rows that the budget "auto" means of `pool` rows; None where the strategy itself decides."""
        return budget_rows(AUTO_BUDGET, pool)

    def releases(self, spec: RunSpec) -> int:
        """How many releases of a site one selection makes; 0: sites release nothing."""
        return 0 if self.privacy_unit is None else 1

    def privacy_note(self, spec: RunSpec) -> str:
        """The model card's sentence about clipping and noise; empty where nothing is released."""
        privacy = spec.privacy.selection
        if self.privacy_unit is None:
            return ""
        if not privacy.noised:
            return f"Released {self.released} carried no noise: no differential-privacy guarantee is claimed for them."
        return (
            f"{self.clipped_and_noised.format(clip_norm=privacy.clip_norm)} (Gaussian, noise multiplier "
            f"{privacy.noise_multiplier:.4g}); every site's own ledger states the {self.privacy_unit}-level epsilon at "
            f"delta {privacy.delta:g}."
        )

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError, "SETTING: ...", when the run's other settings do not fit the strategy."""
