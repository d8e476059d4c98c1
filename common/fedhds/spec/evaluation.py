"""When the global adapter is evaluated, and how much text is generated for it."""

from __future__ import annotations

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import MAX_COUNT, MAX_TOKENS


class EvaluationSpec(Parameters):
    """Evaluation at sites that hold evaluation rows."""

    every: int = parameter(
        5,
        "Evaluate after each such number of rounds, and always before the first and after the last; 0: only then.",
        setting="evaluate_every",
        ge=0,
        le=MAX_COUNT,
    )
    max_new_tokens: int = parameter(128, "Most tokens generated per row in an evaluation.", ge=1, le=MAX_TOKENS)
