"""Differential privacy of what sites release."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from fedhds.settings import Parameters, parameter


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


class PrivacySpec(Parameters):
    """One part for each kind of release."""

    selection: SelectionPrivacySpec = Field(default_factory=SelectionPrivacySpec)
