"""Greedy answers to prompts, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from fedhds_client.data.prompts import Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.probing import without_own_generation


def generate(model: InferenceModel, prompter: Prompter, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Greedy answers, in the order of `rows`; left padding, made here, as decoding goes on at the right.

    They end at a stop token, or after `max_new_tokens` or what the model's context leaves. A model that padding on the
    left disturbs answers one prompt at a time.
    """
    prompts = [prompter.encode_prompt(row, reserve=max_new_tokens).input_ids for row in rows]
    if model.left_padding:
        return _answers(model, prompter, prompts, max_new_tokens)
    return [answer for prompt in prompts for answer in _answers(model, prompter, [prompt], max_new_tokens)]


def _answers(model: InferenceModel, prompter: Prompter, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Of one batch."""
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
    room = min(max_new_tokens, model.max_length - prompter.max_length // 4)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=sorted(ends)
    )
    # Of the model's own defaults its stop tokens count; no other may decide what is measured. PEFT's wrapper takes the
    # inner model's, too.
    with without_own_generation(inner):
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    texts: list[str] = model.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [prompter.answer(text) for text in texts]
