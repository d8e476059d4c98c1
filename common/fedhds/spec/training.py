"""How a site trains in one round."""

from __future__ import annotations

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import MAX_BATCH, MAX_EPOCHS


class TrainingSpec(Parameters):
    """Local training."""

    learning_rate: float = parameter(3e-4, "Adam's learning rate.", gt=0)
    local_epochs: int = parameter(1, "Passes over the coreset in one round.", ge=1, le=MAX_EPOCHS)
    batch_size: int = parameter(4, "Rows per optimizer step.", ge=1, le=MAX_BATCH)
    max_grad_norm: float = parameter(1.0, "Clip the gradient to this L2 norm; 0: no clipping.", ge=0)
