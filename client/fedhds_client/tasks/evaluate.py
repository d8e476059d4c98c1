"""The task "evaluate": the site measures a global adapter on its held-out rows."""

from __future__ import annotations

import logging

from fedhds.errors import PrivacyError, TaskError
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult

logger = logging.getLogger(__name__)


class EvaluateTask(SiteTask):
    """All metrics of `fedhds_client.evaluation.METRICS`."""

    doing = "evaluating"

    def run(self, context: TaskContext) -> TaskResult:
        from fedhds_client.evaluation.evaluate import evaluate

        site, models, number = context.site, context.models, context.task.round_number
        if site.held_out is None:
            raise TaskError("this site has no rows to evaluate on")
        if len(site.held_out) < (floor := context.settings.min_cluster_rows):
            raise PrivacyError(
                f"this site has {len(site.held_out)} rows to evaluate on, and measures none below {floor}"
            )
        models.model.load(context.adapter)
        sums = evaluate(
            models.model,
            site.held_out,
            models.prompter,
            max_new_tokens=models.spec.evaluation.max_new_tokens,
            batch_size=context.settings.inference_batch_size,
            progress=context.control.report,
            cancelled=context.control.cancelled,
        )
        when = f"after round {number}" if number else "before the first round"
        means = ", ".join(f"{name} {value:.4f}" for name, value in sums.means.items())
        logger.info("%s: %s %s on %d held-out rows", site.name, when, means, sums.rows)
        metrics = {name: pb.MetricSum(value_sum=total, weight=weight) for name, (total, weight) in sums.metrics.items()}
        return TaskResult(pb.EvaluationResult(rows=sums.rows, metrics=metrics))
