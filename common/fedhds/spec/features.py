"""What rows are compared by: hidden states of a model, pooled and projected."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import MAX_NAME

FeaturePooling = Literal["auto", "last", "mean", "prompt-last"]
FeatureCentering = Literal["none", "public"]


def _check_layers(layers: str) -> str:
    if not re.fullmatch(r"all|last|middle|-?[0-9]+(,-?[0-9]+)*", layers):
        raise ValueError("give all, last, middle, or numbers such as 0,6,-1")
    return layers


class FeatureSpec(Parameters):
    """Features of rows, for selection."""

    layers: Annotated[str, AfterValidator(_check_layers)] = parameter(
        "all",
        "Layers whose hidden states are a row's features: all, last, middle, or numbers such as 0,6,-1, where 0 is the "
        "output of the embeddings. No layer behind the highest of them is run.",
        setting="feature_layers",
        max_length=MAX_NAME,
    )
    pooling: FeaturePooling = parameter(
        "auto",
        "Hidden state of a row's last token, the mean over its tokens, or (prompt-last) the state from which the first "
        "token of its answer is predicted, which says what is to be done next and needs no answer. auto: last for "
        "fedhds, as published; mean for strategies that compare rows of different sites, where it covers the data "
        "better.",
        setting="feature_pooling",
    )
    centering: FeatureCentering = parameter(
        "none",
        "public: take the mean feature of 64 rows that are part of fedhds off every row's, so that features differ by "
        "what rows say, not by what all texts share; nothing is fitted on the rows of sites.",
        setting="feature_centering",
    )
    dimension: int = parameter(
        256,
        "Values per row after a seeded random projection, which is the same at every site.",
        setting="feature_dimension",
        ge=2,
        le=8192,
    )
    model: str = parameter(
        "",
        "Compute features with this model (hub id or path; any small causal model or encoder) instead of the model "
        "that is tuned.",
        setting="feature_model",
        max_length=MAX_NAME,
    )
