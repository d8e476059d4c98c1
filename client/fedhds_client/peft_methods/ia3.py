"""(IA)3: vectors that scale outputs of attention and inputs of feed-forward layers (Liu et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhds.errors import ModelError
from fedhds.spec import Ia3Spec
from fedhds.tensors.manifest import Initial
from fedhds_client.peft_methods.base import PeftMethod
from fedhds_client.peft_methods.targets import resolve_targets

if TYPE_CHECKING:
    from peft import IA3Config

    from fedhds.spec import RunSpec
    from fedhds_client.models.loading import BaseModel


class Ia3(PeftMethod):
    """Vectors start as ones, so that a new adapter changes nothing."""

    def config(self, spec: RunSpec, base: BaseModel) -> IA3Config:
        """Vectors on the run's target modules, or on those that PEFT names for the architecture."""
        from peft import IA3Config
        from peft.utils import (
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
            TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        )

        ia3 = spec.peft
        assert isinstance(ia3, Ia3Spec)
        if ia3.targets != ("auto",):
            targets = resolve_targets(ia3.targets, base, setting="--ia3-targets", method="(IA)3")
            inputs = [target for target in targets if target.rpartition(".")[2] in ia3.feedforward]
            return IA3Config(target_modules=targets, feedforward_modules=inputs, task_type="CAUSAL_LM")
        kind, modules = base.model.config.model_type, [f".{name}" for name, _ in base.model.named_modules()]
        targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, [])
        if not targets or not all(any(name.endswith(f".{target}") for name in modules) for target in targets):
            raise ModelError(
                f"PEFT does not say which modules (IA)3 scales in a {kind} model such as {base.name}; the operator of "
                "the coordinator sets --ia3-targets and --ia3-feedforward"
            )
        inputs = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
        return IA3Config(target_modules=[*targets], feedforward_modules=[*inputs], task_type="CAUSAL_LM")

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """Ones."""
        return Initial.ones()
