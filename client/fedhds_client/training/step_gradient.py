"""How the gradient of one optimizer step comes about: that of the mean loss over the batch's response tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size

from fedhds.errors import TaskError
from fedhds_client.data.prompts import Encoded
from fedhds_client.training.batches import parts_of_like_length
from fedhds_client.training.response_loss import ResponseLoss

logger = logging.getLogger(__name__)

# Tokens that take as long as what a part costs besides its tokens: on two cores 64 rows of a product are as fast, per
# row, as more; a GPU waits for its kernels to start below some thousand tokens.
_OVERHEAD = {"cpu": 32, "cuda": 2048}
# In one part: cuts are searched for in a time that grows with it.
_MAX_ROWS = 512


class StepGradient(Protocol):
    """Leaves the gradient of one optimizer step in `grad` of the parameters, which it finds without any."""

    def __call__(self, batch: Sequence[Encoded]) -> tuple[float, int]:
        """The sum of the losses of the batch's response tokens in nats, and their number.

        A batch that gives no gradient leaves None, and there is no step. Raises TaskError when memory runs out.
        """


class MeanGradient:
    """The gradient of the mean over all response tokens of a batch, however it is cut into parts.

    Rows of like length are computed together, as that saves padding. Where memory runs out, parts get smaller for
    good; the step remains the same, but for rounding and dropout.
    """

    def __init__(self, loss_of: ResponseLoss, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._loss_of = loss_of
        self._parameters = parameters
        self._max_rows = _MAX_ROWS

    def __call__(self, batch: Sequence[Encoded]) -> tuple[float, int]:
        while True:
            try:
                return self._whole(batch)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
                    raise
                self._reduce(len(batch), error)

    def _whole(self, batch: Sequence[Encoded]) -> tuple[float, int]:
        count = sum(sum(row.loss[1:]) for row in batch)
        if not count:
            return 0.0, 0
        lengths, overhead = [len(row.input_ids) for row in batch], _OVERHEAD[self._loss_of.device.type]
        sums = []
        for part in parts_of_like_length(lengths, max_rows=self._max_rows, overhead=overhead):
            total, tokens = self._loss_of([batch[index] for index in part])
            if tokens:
                torch.autograd.backward(total / count)
            sums.append(total.detach())
        return float(torch.stack(sums).double().sum()), count

    def _reduce(self, rows: int, error: RuntimeError) -> None:
        """Halves the parts; raises TaskError where they are single rows."""
        before = min(self._max_rows, rows)
        for parameter in self._parameters:
            parameter.grad = None
        if before == 1:
            raise TaskError(
                "the device ran out of memory in training, with a single row; the operator can lower --max-length"
            ) from error
        self._max_rows = before // 2
        logger.warning(
            "the device ran out of memory; it computes at most %d rows at a time from now on, with the same steps",
            self._max_rows,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
