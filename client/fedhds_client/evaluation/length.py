"""How long greedy answers are: the mean number of tokens over rows, without the one that ends an answer."""

from __future__ import annotations

from fedhds_client.evaluation.base import EvaluatedBatch, Metric


class AnswerTokens(Metric):
    """It is as high as the limit on answers where a model does not learn to end them."""

    def measure(self, batch: EvaluatedBatch) -> tuple[float, float]:
        return sum(batch.answer_tokens), len(batch.rows)
