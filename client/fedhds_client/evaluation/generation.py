"""Greedy answers to prompts, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from fedhds_client.data.prompts import Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.models.adapter import InferenceModel


def generate(model: InferenceModel, prompter: Prompter, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Greedy answers, in the order of `rows`; left padding, made here, as decoding goes on at the right.

    They end at a stop token, or after `max_new_tokens` or what the model's context leaves.
    """
    prompts = [prompter.encode_prompt(row, reserve=max_new_tokens).input_ids for row in rows]
    longest = max(map(len, prompts))
    pad = int(model.tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    inner = model.base.model
    own = inner.generation_config
    ends = set(prompter.stop_ids)
    if own is not None and own.eos_token_id is not None:
        ends |= set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
    # A prompt takes what the answer leaves, but at least a quarter of the longest row.
    room = min(max_new_tokens, model.base.max_length - prompter.max_length // 4)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=sorted(ends)
    )
    # Of the model's own defaults its stop tokens count; penalties, beams and the like, which transformers would take
    # over where `config` is silent, must not decide what is measured. PEFT's wrapper takes the inner model's, too.
    inner.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        out = model.module.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        inner.generation_config = own
    texts: list[str] = model.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts
