"""BEFT: a trained bias on top of each layer's own, if it has one (arXiv 2509.15974)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhds.spec import BeftSpec
from fedhds.tensors.manifest import Initial
from fedhds_client.peft_methods.base import PeftMethod
from fedhds_client.peft_methods.targets import resolve_targets

if TYPE_CHECKING:
    from peft import BeftConfig

    from fedhds.spec import RunSpec
    from fedhds_client.models.loading import BaseModel


class Beft(PeftMethod):
    """Biases start at zero, so that a new adapter changes nothing."""

    def config(self, spec: RunSpec, base: BaseModel) -> BeftConfig:
        """Biases on the run's target modules; PEFT adds them to torch's own linear layers, not to GPT-2's."""
        from peft import BeftConfig
        from torch import nn

        beft = spec.peft
        assert isinstance(beft, BeftSpec)
        targets = resolve_targets(
            beft.targets,
            base,
            setting="--beft-targets",
            method="BEFT, which trains biases of torch.nn.Linear,",
            takes=lambda module: isinstance(module, nn.Linear),
        )
        return BeftConfig(target_modules=targets, task_type="CAUSAL_LM")

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """Zeros."""
        return Initial.zeros()
