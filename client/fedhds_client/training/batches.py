"""Which rows make each optimizer step, and how a step's rows are cut into parts that are computed together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedhds.spec import TrainingSpec


@dataclass(frozen=True)
class BatchPlan:
    """The rows of every optimizer step of a round."""

    steps: int
    pass_steps: int
    """Steps of one pass over the rows."""
    batches: Iterator[list[int]]


def steps_of(spec: TrainingSpec, rows: int) -> int:
    """Optimizer steps of a round over so many rows."""
    return spec.local_steps or spec.local_epochs * steps_of_pass(spec, rows)


def steps_of_pass(spec: TrainingSpec, rows: int) -> int:
    """Optimizer steps of one pass over so many rows."""
    return math.ceil(rows / spec.batch_size)


def shuffled_batches(rows: Sequence[int], spec: TrainingSpec, order: torch.Generator) -> Iterator[list[int]]:
    """The rows of each step: every pass in another order, the last batch of a pass with what is left."""
    for step in range(steps_of(spec, len(rows))):
        place = step % steps_of_pass(spec, len(rows)) * spec.batch_size
        if not place:
            shuffled = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
        yield shuffled[place : place + spec.batch_size]


def parts_of_like_length(lengths: Sequence[int], *, max_rows: int, overhead: int) -> list[list[int]]:
    """Cuts a batch into parts of at most `max_rows` rows, so that little of what is computed is padding.

    `lengths` are those of the rows, in tokens; a part has indices of them, longest first. A part costs its rows times
    its longest row, and `overhead` tokens for being a part of its own; the cuts cost the least together.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    # Of the first n rows: the least cost, and where the last part begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        # What a longer part would add is at least what it pads.
        starts = range(max(0, end - max_rows), end)
        best.append(min((best[s][0] + overhead + (end - s) * lengths[order[s]], s) for s in starts))
    parts: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        parts.append(order[start:end])
        end = start
    return parts[::-1]
