"""The tasks "evaluate" and "validate": the site measures a global adapter on rows that do not train."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from fedhds.errors import PolicyError, PrivacyError, TaskError
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult

if TYPE_CHECKING:
    from fedhds_client.data.shard import Shard
    from fedhds_client.site import Site

logger = logging.getLogger(__name__)


class _MeasuringTask(SiteTask):
    """Measures the task's adapter on some of the site's rows."""

    _kind_of_rows: ClassVar[str] = "held-out rows"

    @abstractmethod
    def _rows(self, site: Site) -> Shard | None:
        """The rows that are measured."""

    def _max_new_tokens(self, context: TaskContext) -> int:
        """Tokens of the longest answer; 0: none are generated, and metrics that need them are left out."""
        return context.models.spec.evaluation.max_new_tokens

    def run(self, context: TaskContext) -> TaskResult:
        from fedhds_client.evaluation.evaluate import evaluate

        site, models, number = context.site, context.models, context.task.round_number
        rows = self._rows(site)
        if rows is None:
            raise TaskError(f"this site has no rows to {context.task.kind} on")
        if not context.settings.rules.allow_exact_metrics:
            raise PolicyError("the site's policy does not allow it: allow-exact-metrics: metrics are exact")
        if len(rows) < (floor := context.settings.rules.min_cluster_rows):
            raise PrivacyError(
                f"this site has {len(rows)} rows to {context.task.kind} on, and measures none below {floor}"
            )
        models.model.load(context.adapter)
        sums = evaluate(
            models.model,
            rows,
            models.prompter,
            max_new_tokens=self._max_new_tokens(context),
            batch_size=context.settings.inference_batch_size,
            progress=context.control.report,
            cancelled=context.control.cancelled,
        )
        when = f"after round {number}" if number else "before the first round"
        means = ", ".join(f"{name} {value:.4f}" for name, value in sums.means.items())
        logger.info("%s: %s %s on %d %s", site.name, when, means, sums.rows, self._kind_of_rows)
        metrics = {name: pb.MetricSum(value_sum=total, weight=weight) for name, (total, weight) in sums.metrics.items()}
        return TaskResult(pb.EvaluationResult(rows=sums.rows, metrics=metrics))


class EvaluateTask(_MeasuringTask):
    """All metrics of `fedhds_client.evaluation.METRICS`, which are reported and decide nothing."""

    doing = "evaluating"

    def _rows(self, site: Site) -> Shard | None:
        return site.held_out


class ValidateTask(_MeasuringTask):
    """The loss alone: it is measured after every round, and steers the run."""

    doing = "validating"
    _kind_of_rows = "validation rows"

    def _rows(self, site: Site) -> Shard | None:
        return site.validation

    def _max_new_tokens(self, context: TaskContext) -> int:
        return 0
