"""The learning rate within a run."""

from __future__ import annotations

import math

from fedhds.spec import TrainingSpec


def learning_rate(spec: TrainingSpec, *, round_number: int, rounds: int, step: int, steps: int) -> float:
    """The rate of a step, from 0, of `steps` that the site makes in round `round_number`, from 1, of `rounds`.

    A schedule spans the run, as the global adapter is trained by all of its rounds: one of each round would end every
    round with steps that change nothing. Rises to the full rate with the last step of the warm-up and falls to 0
    behind the last step of the run (transformers' linear and cosine, over all rounds' steps).
    """
    start, end = ((round_number - 1 + (step + part) / steps) / rounds for part in (0, 1))
    if spec.lr_warmup and end < spec.lr_warmup:
        return spec.learning_rate * end / spec.lr_warmup
    done = max(0.0, start - spec.lr_warmup) / (1 - spec.lr_warmup)
    match spec.lr_schedule:
        case "linear":
            return spec.learning_rate * (1 - done)
        case "cosine":
            return spec.learning_rate * (1 + math.cos(math.pi * done)) / 2
        case _:
            return spec.learning_rate
