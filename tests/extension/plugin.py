"""A plug-in in one file: a strategy, an aggregator, a server optimizer, a PEFT method, a metric and an observer.

`python plugin.py server FLAG...` and `python plugin.py client FLAG...` register what their side needs and then are
`fedhds-server` and `fedhds-client`. What only one side can import is imported in that side's function.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedhds.evaluation import METRICS, MetricInfo
from fedhds.settings import parameter
from fedhds.spec import (
    AGGREGATOR_SPECS,
    OPTIMIZER_SPECS,
    PEFT_SPECS,
    STRATEGY_SPECS,
    AggregatorSpec,
    OptimizerSpec,
    PeftSpec,
    RunSpec,
    StrategySpec,
)
from fedhds.tensors.manifest import FloatArray, Initial, TensorSpec

if TYPE_CHECKING:
    from google.protobuf.message import Message

# Values of a tensor whose median is taken at once: memory is that of so many for each site.
_BLOCK = 1 << 16


class MedianSpec(AggregatorSpec):
    """Median of the updates, value by value (Yin et al. 2018, "Byzantine-Robust Distributed Learning", Alg. 1)."""

    summary = "their median, value by value"

    name: Literal["median"] = "median"
    odd_role: str = parameter(
        "", "Role of the tensors that alone train in odd rounds; empty: all train.", setting="median_odd_role"
    )


class AdagradSpec(OptimizerSpec):
    """Adagrad whose squares start at zero (Duchi et al. 2011)."""

    summary = "with a step per value that shrinks as updates add up"

    name: Literal["zero-adagrad"] = "zero-adagrad"
    learning_rate: float = parameter(
        0.1, "Step of a value that moves for the first time.", setting="adagrad_learning_rate", gt=0
    )
    tau: float = parameter(1e-3, "Added to the root of the squares' sum.", setting="adagrad_tau", gt=0)


class ScalingSpec(PeftSpec):
    """PEFT's (IA)3 with a role for each kind of vector."""

    summary = "vectors that scale activations, in two roles"

    method: Literal["scaling"] = "scaling"
    targets: tuple[str, ...] = parameter(
        ("k_proj", "v_proj"), "Modules whose outputs are scaled.", setting="scaling_targets", min_length=1
    )
    feedforward: tuple[str, ...] = parameter(
        ("down_proj",), "Modules whose inputs are scaled.", setting="scaling_feedforward"
    )

    @property
    def peft_type(self) -> str:
        return "IA3"


class CentralSpec(StrategySpec):
    """Rows near the mean of all sites' rows, in two steps: the sites' sums, then how many rows are near their mean."""

    summary = "rows near the mean of all sites' rows"
    shared_space = True
    privacy_unit = "client"
    released = "sums of features"

    name: Literal["central"] = "central"
    share: float = parameter(
        0.5, "Share of a site's rows that count as near the mean.", setting="central_share", gt=0, le=1
    )

    @property
    def request_type(self) -> type[Message]:
        from google.protobuf.struct_pb2 import ListValue

        return ListValue

    @property
    def report_type(self) -> type[Message]:
        return report_message()

    def releases(self, spec: RunSpec) -> int:
        return 2

    def check(self, spec: RunSpec) -> None:
        if spec.privacy.selection.noised:
            raise ValueError("selection_noise_multiplier: the strategy central has no noise; drop the multiplier")


@cache
def report_message() -> type[Message]:
    """`message Report { repeated double sums = 1; uint64 near = 2; }`, made without a generator."""
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

    file = FileDescriptorProto(name="central.proto", package="central", syntax="proto3")
    message = file.message_type.add(name="Report")
    repeated, single = FieldDescriptorProto.LABEL_REPEATED, FieldDescriptorProto.LABEL_OPTIONAL
    message.field.add(name="sums", number=1, type=FieldDescriptorProto.TYPE_DOUBLE, label=repeated)
    message.field.add(name="near", number=2, type=FieldDescriptorProto.TYPE_UINT64, label=single)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("central.Report"))


def register() -> None:
    """What both sides know."""
    AGGREGATOR_SPECS["median"] = MedianSpec
    OPTIMIZER_SPECS["zero-adagrad"] = AdagradSpec
    PEFT_SPECS["scaling"] = ScalingSpec
    STRATEGY_SPECS["central"] = CentralSpec
    METRICS["answer_length"] = MetricInfo("answer length (characters)", 0, 1e6)


def register_server() -> None:
    """The coordinator's half."""
    from google.protobuf.struct_pb2 import ListValue

    from fedhds_server.aggregation import AGGREGATORS, Aggregator
    from fedhds_server.aggregation.base import Shares
    from fedhds_server.observers import OBSERVERS, ObserverContext, RunObserver
    from fedhds_server.optimizers import OPTIMIZERS, ServerOptimizer
    from fedhds_server.run.state import ClosedRound, Evaluation, Phase
    from fedhds_server.selection import STRATEGIES, InterClientSelection, Report, Selection, SelectionContext
    from fedhds_server.selection.allocation import coresets, in_proportion

    class Median(Aggregator):
        description = "median of the updates, value by value"

        def trainable(self, parameters: MedianSpec, round_number: int, roles: frozenset[str]) -> frozenset[str]:
            return roles & {parameters.odd_role} if parameters.odd_role and round_number % 2 else roles

        def combine(
            self,
            parameters: MedianSpec,
            group: Sequence[TensorSpec],
            current: Sequence[FloatArray],
            shares: Shares,
            update: Callable[[int], Sequence[FloatArray]],
        ) -> Sequence[FloatArray]:
            [value] = current
            median = np.empty(value.size, dtype=np.float32)
            for begin in range(0, value.size, _BLOCK):
                block = slice(begin, begin + _BLOCK)
                median[block] = np.median([update(index)[0].ravel()[block] for index in range(len(shares))], axis=0)
            return [median.reshape(value.shape)]

    class Adagrad(ServerOptimizer):
        slots = ("squares",)

        def step(
            self,
            parameters: AdagradSpec,
            value: FloatArray,
            combined: FloatArray,
            slots: Mapping[str, FloatArray],
            round_number: int,
        ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
            difference = combined - value
            squares = slots["squares"] + difference**2
            step = parameters.learning_rate * difference / (np.sqrt(squares) + parameters.tau)
            return value + step.astype(np.float32), {"squares": squares}

    class Central(InterClientSelection):
        def check(self, spec: RunSpec, request: ListValue | None, report: Any, *, rows: int) -> str:
            if request is not None:
                return "" if 0 < report.near <= rows else f"{report.near} of its {rows} rows cannot be near the mean"
            dimension = spec.selection.features.dimension
            return "" if len(report.sums) == dimension else f"its sums are not of {dimension} values"

        def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection | ListValue:
            messages = {site: reports[site].message for site in sorted(reports)}
            if context.request is None:
                sums = np.sum([message.sums for message in messages.values()], axis=0)
                center = ListValue()
                center.extend((sums / sum(context.rows.values())).tolist())
                return center
            near: dict[tuple[str, int | None], int] = {(site, 0): message.near for site, message in messages.items()}
            note = f"central: {sum(near.values())} rows are near the mean of {len(near)} sites"
            return Selection(coresets(in_proportion(near, context.budget or 0), reports), notes=(note,))

    class Diary(RunObserver):
        """diary.txt in the run folder: every line once, also after a restart."""

        def __init__(self, context: ObserverContext) -> None:
            super().__init__(context)
            self._path = context.folder / "diary.txt"

        def started(self, run_id: str, rounds: Sequence[ClosedRound]) -> None:
            aggregation = self.context.spec.aggregation
            self._write(f"run {run_id}: {aggregation.aggregator.name}, {aggregation.optimizer.name}")
            for closed in rounds:
                self.round_closed(closed)

        def round_closed(self, closed: ClosedRound) -> None:
            self._write(f"round {closed.round_number}: {', '.join(sorted(closed.contributions))}")

        def evaluated(self, round_number: int, site: str, evaluation: Evaluation) -> None:
            self._write(f"evaluation {round_number}: {site}, {', '.join(evaluation.metrics)}")

        def ended(self, phase: Phase, message: str) -> None:
            self._write(f"{phase}: {message}")

        def _write(self, line: str) -> None:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            if line not in lines:
                self._path.write_text("\n".join([*lines, line]) + "\n")

    AGGREGATORS["median"] = Median()
    OPTIMIZERS["zero-adagrad"] = Adagrad()
    STRATEGIES["central"] = Central()
    OBSERVERS["diary"] = Diary


def register_client() -> None:
    """A site's half."""
    from fedhds_client.evaluation import METRICS, EvaluatedBatch, Metric
    from fedhds_client.peft_methods import PEFT_METHODS, PeftMethod
    from fedhds_client.selection import STRATEGIES, IntraClientSelection, SelectionContext
    from fedhds_client.selection.coreset import save_clusters

    if TYPE_CHECKING:
        from peft import IA3Config

        from fedhds_client.models.loading import BaseModel

    class Scaling(PeftMethod):
        def config(self, spec: RunSpec, base: BaseModel) -> IA3Config:
            from peft import IA3Config

            method = spec.peft
            assert isinstance(method, ScalingSpec)
            return IA3Config(
                target_modules=[*method.targets, *method.feedforward],
                feedforward_modules=[*method.feedforward],
                task_type="CAUSAL_LM",
            )

        def role(self, spec: RunSpec, name: str) -> str:
            assert isinstance(spec.peft, ScalingSpec)
            return "feedforward" if name.split(".")[-2] in spec.peft.feedforward else "attention"

        def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
            return Initial.ones()

    class Central(IntraClientSelection):
        def release(self, context: SelectionContext) -> Any:
            features, strategy, reporter = context.features(), context.spec.selection.strategy, context.reporter
            assert isinstance(strategy, CentralSpec)
            report: Any = strategy.report_type()
            if context.request is None:
                report.sums.extend(features.values.sum(axis=0, dtype=np.float64))
            else:
                distances = np.linalg.norm(features.values - np.array([*context.request]), axis=1)
                rows = features.ids[np.argsort(distances, kind="stable")].tolist()
                report.near = math.ceil(strategy.share * len(rows))
                near, others = rows[: report.near], rows[report.near :]
                save_clusters(
                    reporter.folder, reporter.run_id, context.task_id, [near], unclustered=others, rows=context.rows
                )
            reporter.record(
                context.task_id,
                report,
                release="sums",
                sensitivity=None,
                released=1,
                dimension=context.spec.selection.features.dimension,
            )
            return report

    class AnswerLength(Metric):
        def measure(self, batch: EvaluatedBatch) -> tuple[float, float]:
            return sum(map(len, batch.answers)), len(batch.rows)

    PEFT_METHODS["scaling"] = Scaling()
    STRATEGIES["central"] = Central()
    METRICS["answer_length"] = AnswerLength()


def main() -> None:
    """Registers, and hands over to the packages."""
    side = sys.argv[1]
    sys.argv = [f"fedhds-{side}", *sys.argv[2:]]
    register()
    if side == "server":
        register_server()
        from fedhds_server.cli import main as run
    else:
        register_client()
        from fedhds_client.cli import main as run
    run()


if __name__ == "__main__":
    main()
