"""One pass over held-out rows: the model reads the responses and answers the prompts, and metrics measure both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fedhds.errors import TaskError
from fedhds_client.computation import Cancelled
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.evaluation import METRICS, EvaluatedBatch, EvaluationSums
from fedhds_client.evaluation.generation import generate
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.training.response_loss import ResponseLoss


def evaluate(
    model: InferenceModel,
    shard: Shard,
    prompter: Prompter,
    *,
    max_new_tokens: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    progress: Callable[[float], None] = lambda share: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> EvaluationSums:
    """Measures rows of `shard` (ids; None: all) by all metrics: their responses are read, greedy answers generated.

    With `max_new_tokens` 0 no answer is generated, and metrics that need one are left out. Rows of like length share a
    batch; that changes padding, not results. Raises Cancelled, and TaskError when memory runs out or the loss is not
    finite.
    """
    order = sorted(
        range(len(shard)) if rows is None else rows, key=lambda row: len(prompter.encode(shard[row]).input_ids)
    )
    metrics = {name: metric for name, metric in METRICS.items() if max_new_tokens or not metric.needs_answers}
    loss_of = ResponseLoss(model)
    sums = EvaluationSums()
    model.module.eval()
    try:
        for begin in range(0, len(order), batch_size):
            if cancelled():
                raise Cancelled("the evaluation was stopped")
            own = [shard[row] for row in order[begin : begin + batch_size]]
            with torch.inference_mode():
                total, tokens = loss_of([prompter.encode(row).last_answer() for row in own])
                answers = generate(model, prompter, own, max_new_tokens) if max_new_tokens else []
            if not math.isfinite(float(total)):
                raise TaskError("the loss on the held-out rows is not finite under this adapter")
            lengths = [answer.tokens for answer in answers]
            batch = EvaluatedBatch(own, [answer.text for answer in answers], float(total), tokens, lengths)
            sums += EvaluationSums(len(own), {name: metric.measure(batch) for name, metric in metrics.items()})
            progress((begin + len(own)) / len(order))
    except torch.OutOfMemoryError as error:
        raise TaskError("the device ran out of memory in evaluation; lower --inference-batch-size") from error
    return sums
