"""Differential privacy of what sites release."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from fedhds.settings import Parameters, parameter

if TYPE_CHECKING:
    from fedhds.spec.run import RunSpec


class SelectionPrivacySpec(Parameters):
    """Clipping and noise on what a site releases for selection."""

    clip_norm: float = parameter(
        0.0,
        "Clip each released centroid (federated-kmeans: each row's features, of norm 1) to this L2 norm; 0: no "
        "clipping. Noise needs it.",
        setting="selection_clip_norm",
        ge=0,
    )
    noise_multiplier: float = parameter(
        0.0,
        "Noise on released centroids (federated-kmeans: on sums and counts): standard deviation divided by the "
        "release's L2 sensitivity.",
        setting="selection_noise_multiplier",
        ge=0,
    )
    delta: float = parameter(1e-5, "Delta of the guarantee for selection.", setting="selection_delta", gt=0, lt=1)
    released_centroids: int = parameter(
        16,
        "Under noise, each site releases exactly this many centroids (padded); federated-kmeans: the number of "
        "centers.",
        ge=1,
        le=4096,
    )

    @property
    def noised(self) -> bool:
        """Whether noise is added before anything leaves a site."""
        return self.noise_multiplier > 0

    @model_validator(mode="after")
    def _check_clipping(self) -> Self:
        if self.noised and not self.clip_norm:
            raise ValueError(
                "selection_clip_norm: noise needs a clipping norm, else its guarantee is void; set it above 0"
            )
        return self


class TrainingPrivacySpec(Parameters):
    """Differentially private training of the adapter (DP-SGD, Abadi et al. 2016): the unit is one row, left out."""

    epsilon: float = parameter(
        0.0,
        "Train with DP-SGD: epsilon of each row over all rounds of the run, releases for selection in the same privacy "
        "unit included. Every site sets its noise by it. 0: no noise, unless --dp-noise-multiplier sets some.",
        ge=0,
    )
    delta: float = parameter(1e-5, "Delta of the guarantee for training.", gt=0, lt=1)
    noise_multiplier: float = parameter(
        0.0,
        "Train with DP-SGD and this noise: standard deviation divided by --dp-max-grad-norm; sites tell epsilon.",
        setting="dp_noise_multiplier",
        ge=0,
    )
    max_grad_norm: float = parameter(
        1.0, "DP-SGD clips each row's gradient to this L2 norm.", setting="dp_max_grad_norm", gt=0
    )

    @property
    def noised(self) -> bool:
        """Whether adapters are trained with DP-SGD."""
        return self.epsilon > 0 or self.noise_multiplier > 0

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if self.epsilon and self.noise_multiplier:
            raise ValueError("epsilon: it sets the noise itself; drop --dp-noise-multiplier")
        return self

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError, "SETTING: ...", where DP-SGD has no guarantee or cannot train the adapter."""
        if not self.noised:
            return
        strategy = spec.selection.strategy
        if strategy.pick_change == "any":
            raise ValueError(
                f"selection_strategy: with {strategy.name} one row can change all that train, so DP-SGD would "
                "guarantee nothing; choose full, random or federated-kmeans"
            )
        if strategy.pick_change == "one" and not spec.privacy.selection.noised:
            raise ValueError(
                f"selection_noise_multiplier: {strategy.name} without noise tells of rows what DP-SGD is to hide; "
                "set it above 0"
            )
        if strategy.coreset_kind == "random" and spec.selection.filters:
            raise ValueError(
                f"selection_filters: one row that passes or not changes the whole draw of {strategy.name}, so DP-SGD "
                "would guarantee nothing; drop the filters or choose full"
            )
        if spec.peft.dp_sgd_obstacle:
            raise ValueError(f"peft_method: DP-SGD cannot train it: {spec.peft.dp_sgd_obstacle}")


class PrivacySpec(Parameters):
    """One part for each kind of release."""

    selection: SelectionPrivacySpec = Field(default_factory=SelectionPrivacySpec)
    training: TrainingPrivacySpec = Field(default_factory=TrainingPrivacySpec)

    @property
    def noised(self) -> bool:
        """Whether anything is noised; then nothing exact of the training rows leaves beside it."""
        return self.selection.noised or self.training.noised
