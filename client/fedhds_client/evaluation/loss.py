"""Loss: the mean negative log-likelihood of the rows' responses per token, in nats."""

from __future__ import annotations

from fedhds_client.evaluation.base import EvaluatedBatch, Metric


class Loss(Metric):
    """Weighted by response tokens."""

    needs_answers = False

    def measure(self, batch: EvaluatedBatch) -> tuple[float, float]:
        return batch.loss_sum, batch.tokens
