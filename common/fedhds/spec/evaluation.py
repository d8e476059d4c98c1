"""When the global adapter is measured, how much text is generated for it, and what validation decides."""

from __future__ import annotations

from typing import Literal

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import MAX_COUNT, MAX_ROUNDS, MAX_TOKENS


class EvaluationSpec(Parameters):
    """Evaluation at sites that hold evaluation rows, and validation at sites that hold validation rows."""

    every: int = parameter(
        5,
        "Evaluate after each such number of rounds, and always before the first and after the last; 0: only then.",
        setting="evaluate_every",
        ge=0,
        le=MAX_COUNT,
    )
    max_new_tokens: int = parameter(128, "Most tokens generated per row in an evaluation.", ge=1, le=MAX_TOKENS)
    early_stop_patience: int = parameter(
        0,
        "End the run when the loss on the sites' validation rows has not improved for this many rounds; 0: never. "
        "The run waits until a site with validation rows is enrolled.",
        ge=0,
        le=MAX_ROUNDS,
    )
    early_stop_min_delta: float = parameter(
        0.0, "Nats per token by which the validation loss must fall to count as better for early stopping.", ge=0
    )
    rollback_on_loss: float = parameter(
        0.5,
        "Give up a round's adapter and go on from the one before when the validation loss is more than this many nats "
        "per token above the lowest so far; 0: never. It takes sites with validation rows.",
        ge=0,
    )
    deliver: Literal["final", "best"] = parameter(
        "final",
        "Adapter that sites get in the end: that of the last round, or of the round with the lowest validation loss. "
        "The coordinator keeps both. With best, the run waits until a site with validation rows is enrolled.",
    )

    @property
    def needs_validation(self) -> bool:
        """Whether a run without a site that validates could not do what its operator asks."""
        return bool(self.early_stop_patience) or self.deliver == "best"
