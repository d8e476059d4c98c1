"""One pass over held-out rows: the model reads the responses and answers the prompts, and metrics measure both."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    progress: Callable[[float], None] = lambda share: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> EvaluationSums:
    """Measures all rows of `shard` by all metrics: the rows' responses are read, greedy answers are generated.

    Rows of like length share a batch; that changes padding, not results. Raises Cancelled, and TaskError when memory
    runs out or the loss is not finite.
    """
    order = sorted(range(len(shard)), key=lambda row: len(prompter.encode(shard[row]).input_ids))
    loss_of = ResponseLoss(model)
    sums = EvaluationSums()
    model.module.eval()
    try:
        for begin in range(0, len(order), batch_size):
            if cancelled():
                raise Cancelled("the evaluation was stopped")
            rows = [shard[row] for row in order[begin : begin + batch_size]]
            with torch.inference_mode():
                total, tokens = loss_of([prompter.encode(row).last_answer() for row in rows])
                answers = generate(model, prompter, rows, max_new_tokens)
            if not math.isfinite(float(total)):
                raise TaskError("the loss on the held-out rows is not finite under this adapter")
            batch = EvaluatedBatch(rows, answers, float(total), tokens)
            sums += EvaluationSums(len(rows), {name: metric.measure(batch) for name, metric in METRICS.items()})
            progress((begin + len(rows)) / len(order))
    except torch.OutOfMemoryError as error:
        raise TaskError("the device ran out of memory in evaluation; lower --inference-batch-size") from error
    return sums
