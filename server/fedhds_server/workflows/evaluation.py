"""Evaluation: sites with held-out rows measure global adapters beside the rounds; no stage waits for them.

Validation is the same on other rows, by loss alone: it steers the run, so a round opens only when that of the round
before is in.
"""

from __future__ import annotations

import re

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from fedhds.errors import RequestError
from fedhds.evaluation import METRICS
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run import validation
from fedhds_server.run.events import Instruction, Record, ResultReceived
from fedhds_server.run.state import Evaluation, MetricSum, Phase, RunState, Site, Task
from fedhds_server.workflows.base import TaskKind

_MAX_WEIGHT = 1e15
_MAX_METRICS = 32
# Values that no metric has; what is summed over sites and rounds stays finite below it.
_MAX_MEAN = 1e9
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class EvaluationTasks(TaskKind):
    """A task for each evaluator and each evaluated round; results count whenever they come before the run's end."""

    kind = "evaluate"
    _name, _rows, _measured = "evaluation", "held-out rows", "rows"

    def request(self, state: RunState, task: Task) -> None:
        return None

    def adapter(self, state: RunState, task: Task) -> Artifact:
        return state.adapters[task.round_number]

    def check(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        evaluation, declared = read(result), self._declared(state.sites[task.site])
        # A site that registered with an older coordinator declared none.
        if declared and evaluation.rows > declared:
            claim = f"the {self._name} claims {evaluation.rows} rows, the site declared {declared} {self._rows}"
            return "evaluation", claim
        tokens = evaluation.rows * state.spec.model.max_length
        for name, metric in evaluation.metrics.items():
            if metric.weight > tokens:
                claim = f"the {self._name} weighs {name} with {metric.weight:g}"
                return "evaluation", f"{claim}, its {evaluation.rows} rows have at most {tokens} tokens"
        return None

    def accept(self, state: RunState, task: Task, event: ResultReceived) -> list[Instruction]:
        evaluation = read(event.result)
        self._kept(state).setdefault(task.round_number, {})[task.site] = evaluation
        when = f"after round {task.round_number}" if task.round_number else "before the first round"
        means = [f"{name} {metric.value_sum / metric.weight:.4f}" for name, metric in evaluation.metrics.items()]
        return [Record(f"{when}, {task.site} measures {', '.join(means)} on {evaluation.rows} {self._measured}")]

    def _declared(self, site: Site) -> int:
        return site.evaluation_rows

    def _kept(self, state: RunState) -> dict[int, dict[str, Evaluation]]:
        return state.evaluations


class ValidationTasks(EvaluationTasks):
    """A task for each validating site and each round; results that steer the run."""

    kind = validation.KIND
    _name, _rows, _measured = "validation", "validation rows", "validation rows"

    def check(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        if "loss" not in read(result).metrics:
            return "evaluation", "the validation has no loss"
        return super().check(state, task, result)

    def _declared(self, site: Site) -> int:
        return site.validation_rows

    def _kept(self, state: RunState) -> dict[int, dict[str, Evaluation]]:
        return state.validations


def evaluated_rounds(state: RunState) -> list[int]:
    """Rounds whose adapters are evaluated, of those that have one now: in the end the best one, too."""
    every = state.spec.evaluation.every
    ends = (max(state.adapters), state.best_round) if state.phase is Phase.FINISHING else (state.spec.rounds.count,)
    return sorted(number for number in state.adapters if number in (0, *ends) or (every and number % every == 0))


def missing_evaluations(state: RunState) -> list[tuple[str, int, str]]:
    """Task id, round and site of every evaluation that should be asked for and has not come."""
    if not state.started_at or state.phase.over:
        return []
    return [
        (f"evaluate/{number}/{site}", number, site)
        for site in state.evaluators
        for number in evaluated_rounds(state)
        if site not in state.evaluations.get(number, {}) and f"evaluate/{number}/{site}" not in state.failed_evaluations
    ]


def read(result: Any) -> Evaluation:
    """An evaluator's sums; raises RequestError for a message that is none, or that says what no model gives."""
    message = pb.EvaluationResult()
    try:
        if not result.Unpack(message):
            raise RequestError(
                f"an evaluate task is completed by a fedhds.v2.EvaluationResult, not by a {result.TypeName()[:100]!r}"
            )
    except DecodeError as error:
        raise RequestError("the evaluation's bytes are no message of its type") from error
    if not 0 < message.rows <= _MAX_WEIGHT:
        raise RequestError(f"an evaluation needs rows, at most {_MAX_WEIGHT:.0e}")
    if not 0 < len(message.metrics) <= _MAX_METRICS:
        raise RequestError(f"an evaluation needs 1 to {_MAX_METRICS} metrics, it has {len(message.metrics)}")
    return Evaluation(
        rows=message.rows, metrics={name: _checked(name, message.metrics[name]) for name in sorted(message.metrics)}
    )


def _checked(name: str, metric: pb.MetricSum) -> MetricSum:
    if not _NAME.fullmatch(name):
        raise RequestError(f"{name[:64]!r} is no name of a metric: it needs small letters, digits and underscores")
    if not 0 < metric.weight <= _MAX_WEIGHT:
        raise RequestError(f"the metric {name} has the weight {metric.weight:g}; it must be above 0 and below 1e15")
    known = METRICS.get(name)
    low, high = (known.low, known.high) if known else (-_MAX_MEAN, _MAX_MEAN)
    slack = 1e-9 * metric.weight
    if not low * metric.weight - slack <= metric.value_sum <= high * metric.weight + slack:
        raise RequestError(f"the sum of {name} is {metric.value_sum:g} over {metric.weight:g}, which no model gives")
    return MetricSum(value_sum=metric.value_sum, weight=metric.weight)
