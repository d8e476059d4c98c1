"""Greedy answers to prompts, in batches with a cache of keys and values that shrink as answers end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fedhds_client.data.prompts import Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.probing import without_own_generation

# Tokens after which rows that have ended leave the batch. Each part costs about one step more than its steps.
_PART = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one prompt."""

    text: str
    tokens: int
    """Generated, without the one that ends it."""


def generate(model: InferenceModel, prompter: Prompter, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
    """Greedy answers, in the order of `rows`; left padding, made here, as decoding goes on at the right.

    They end at a stop token, or after `max_new_tokens` or what the model's context leaves. A model that padding on the
    left disturbs answers one prompt at a time.
    """
    prompts = [prompter.encode_prompt(row, reserve=max_new_tokens).input_ids for row in rows]
    inner = model.base.model
    own = inner.generation_config
    ends = set(prompter.stop_ids)
    if own is not None and own.eos_token_id is not None:
        ends |= set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
    # A prompt takes what the answer leaves, but at least a quarter of the longest row.
    room = min(max_new_tokens, model.max_length - prompter.max_length // 4)
    # Of the model's own defaults its stop tokens count; no other may decide what is measured. PEFT's wrapper takes the
    # inner model's, too.
    with without_own_generation(inner):
        if model.left_padding:
            answers = _continued(model, prompts, room, ends)
        else:
            answers = [answer for prompt in prompts for answer in _continued(model, [prompt], room, ends)]
    texts: list[str] = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        Answer(prompter.answer(text), len(ids) - (ids[-1] in ends)) for text, ids in zip(texts, answers, strict=True)
    ]


def _continued(model: InferenceModel, prompts: Sequence[list[int]], room: int, ends: set[int]) -> list[list[int]]:
    """The tokens behind each prompt of a batch, with the one of `ends` that ends them, `room` at most."""
    longest, pad = max(map(len, prompts)), int(model.tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    places, cache, part = list(range(len(prompts))), None, room
    if len(prompts) > 1 and not model.virtual_tokens:
        part = _PART
    while True:
        start, part = ids.shape[1], min(part, room - (ids.shape[1] - longest))
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=part,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            return_dict_in_generate=True,
        )
        options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
        ids = output.sequences
        open_rows = []
        for row, new in enumerate(ids[:, start:].tolist()):
            length = next((at + 1 for at, token in enumerate(new) if token in ends), len(new))
            answers[places[row]] += new[:length]
            if new[length - 1] not in ends:
                open_rows.append(row)
        cache = getattr(output, "past_key_values", None)
        if not open_rows or ids.shape[1] - longest >= room:
            return answers
        if not _is_divisible(cache):
            # What is left is computed again, in one part.
            cache, part = None, room
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - start)], dim=1)
        if len(open_rows) < len(places):
            kept = torch.tensor(open_rows, device=ids.device)
            ids, mask, places = ids[kept], mask[kept], [places[row] for row in open_rows]
            if cache is not None:
                cache.batch_select_indices(kept)


def _is_divisible(cache: object) -> bool:
    """Whether generation can go on with some rows of a cache: it has keys and values alone, no other state."""
    kinds = {DynamicLayer, DynamicSlidingWindowLayer}
    return isinstance(cache, DynamicCache) and {type(layer) for layer in cache.layers} <= kinds
