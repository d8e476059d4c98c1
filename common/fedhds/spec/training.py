"""How a site trains in one round."""

from __future__ import annotations

from typing import Literal

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import MAX_BATCH, MAX_EPOCHS, MAX_STEPS


class TrainingSpec(Parameters):
    """Local training."""

    learning_rate: float = parameter(3e-4, "Adam's learning rate.", gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = parameter(
        "constant",
        "How the learning rate falls over the whole run, from its first round to 0 at the end of its last; every site "
        "counts its own steps within a round.",
    )
    lr_warmup: float = parameter(
        0.0, "Share of the run's steps over which the learning rate rises from 0 to its full value.", ge=0, lt=1
    )
    weight_decay: float = parameter(0.0, "AdamW's decoupled weight decay; 0: Adam.", ge=0)
    local_epochs: int = parameter(1, "Passes over the coreset in one round.", ge=1, le=MAX_EPOCHS)
    local_steps: int = parameter(
        0,
        "Optimizer steps of every site in one round, however many rows it has, in place of --local-epochs; 0: epochs.",
        ge=0,
        le=MAX_STEPS,
    )
    batch_size: int = parameter(4, "Rows per optimizer step.", ge=1, le=MAX_BATCH)
    max_grad_norm: float = parameter(1.0, "Clip the gradient to this L2 norm; 0: no clipping.", ge=0)
    proximal_mu: float = parameter(
        0.0,
        "FedProx: adds mu/2 times the squared distance from the global adapter to the training loss, so that sites "
        "drift apart less; 0: nothing.",
        ge=0,
    )

    @property
    def amount(self) -> str:
        """How long a round is at a site, for people: "4 local epochs"."""
        number, unit = (self.local_steps, "step") if self.local_steps else (self.local_epochs, "epoch")
        return f"{number} local {unit}{'s' * (number > 1)}"
