"""The base model that is tuned, and how rows become its prompts."""

from __future__ import annotations

from typing import Literal

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import MAX_NAME, MAX_TOKENS

PromptFormat = Literal["auto", "chat", "alpaca"]


class ModelSpec(Parameters):
    """The base model, with the licenses that the model card declares."""

    name: str = parameter(
        ...,
        "Base model: a hub id or a local path. Sites may load the same weights from elsewhere.",
        setting="model",
        min_length=1,
        max_length=MAX_NAME,
    )
    revision: str = parameter(
        "", "Revision of a hub model (branch, tag or commit).", setting="model_revision", max_length=MAX_NAME
    )
    license: str = parameter(
        "not declared", "License of the base model, for the model card.", setting="model_license", max_length=MAX_NAME
    )
    data_license: str = parameter(
        "not declared", "License of the sites' data, for the model card.", max_length=MAX_NAME
    )
    prompt_format: PromptFormat = parameter(
        "auto",
        "How a row becomes a prompt: with the tokenizer's chat template, with the Alpaca template, or auto: the chat "
        "template if the tokenizer has one.",
    )
    max_length: int = parameter(
        1024,
        "Longest row in tokens. Longer rows are truncated, counted and reported. The model's own limit applies if it "
        "is smaller.",
        ge=16,
        le=MAX_TOKENS,
    )
