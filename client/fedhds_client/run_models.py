"""The models of a run: which base model a site loads for it, with the adapter and the prompt format on top."""

from __future__ import annotations

import logging

from fedhds.errors import ModelError
from fedhds.spec import RunSpec
from fedhds_client.data.prompts import Prompter
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import BaseModel, load_base_model
from fedhds_client.models.template_trial import try_template
from fedhds_client.settings import ClientSettings

logger = logging.getLogger(__name__)


def load_models(settings: ClientSettings, spec: RunSpec) -> tuple[BaseModel, AdapterModel, Prompter]:
    """Loads the run's base model, puts the adapter on it and makes its prompter; raises ModelError."""
    name = settings.model or spec.model.name
    revision = "" if settings.model else spec.model.revision
    logger.info("loading the base model %s", name)
    try:
        base = load_base_model(
            name, revision=revision, device=settings.device, dtype=settings.dtype, cache_dir=settings.state
        )
    except ModelError as error:
        if settings.model:
            raise
        raise ModelError(
            f"{error}; the operator of the coordinator sets this --model, and a site may name its own copy with --model"
        ) from error
    if spec.model.prompt_format != "alpaca":
        try_template(name, base.tokenizer, settings.state)
    model = AdapterModel(base, spec)
    length = min(spec.model.max_length, model.max_length)
    try:
        prompter = Prompter(base.tokenizer, max_length=length, prompt_format=spec.model.prompt_format, model=base.model)
    except ModelError as error:
        raise ModelError(f"{error}; the operator of the coordinator sets --prompt-format") from error
    return base, model, prompter
