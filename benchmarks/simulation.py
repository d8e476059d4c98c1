"""A whole selection without network or model: both halves of a strategy and the state machine, on given features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from fedhds.privacy.ledger import Ledger
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, Initial, TensorSpec
from fedhds.v2.selection_pb2 import KMeansCenters
from fedhds_client.features.extraction import Features
from fedhds_client.selection import STRATEGIES, SelectionContext
from fedhds_client.selection.coreset import coreset_rows
from fedhds_client.selection.private_reporter import PrivateReporter
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    CoresetsSelected,
    Instruction,
    NextStep,
    Resolve,
    ResultReceived,
    SiteConnected,
    SiteRegistered,
    StageResolved,
    TaskFailed,
)
from fedhds_server.run.state import RunState, Task
from fedhds_server.selection import Selection
from fedhds_server.workflows import WORKFLOWS
from fedhds_server.workflows.selection import decide

Shards = Mapping[str, npt.NDArray[np.float32]]

_KIND = "select"
_RUN_ID = "run"
# Selection does not look at the adapter; the machine needs one before it starts.
_MANIFEST = AdapterManifest((TensorSpec("q.lora_A.weight", (1, 1), "lora_A", Initial.zeros(), None),), "{}")


@dataclass
class Outcome:
    """What came of a selection."""

    picks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Row ids per site, as the site resolves its coreset."""
    selection: Selection = field(default_factory=lambda: Selection({}))
    centers: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """Centers (k, d) of every step after the first, of strategies that send some."""
    reports: list[tuple[str, Any]] = field(default_factory=list)
    """All that left sites, in order: site and message."""

    @property
    def rows(self) -> list[tuple[str, int]]:
        """All picks."""
        return [(site, row) for site in sorted(self.picks) for row in self.picks[site]]


def select(
    shards: Shards,
    folder: Path,
    strategy: str,
    *,
    order: Callable[[Sequence[str]], Sequence[str]] = sorted,
    leaves: Mapping[str, int] | None = None,
    **settings: Any,
) -> Outcome:
    """Runs one selection over `shards`, features float32 (n, d) per site; sites keep their state below `folder`.

    Sites answer in the `order` of their names; a site in `leaves` fails its task in the step of that number.
    `settings` are the run's, by the names of their flags. Raises ValueError for a report that the coordinator rejects.
    """
    spec = RunSpec.of(
        **{
            "model": "m",
            "rounds": 1,
            "selection_strategy": strategy,
            "feature_dimension": next(iter(shards.values())).shape[1],
            "min_sites": sum(len(values) > 0 for values in shards.values()),
        }
        | settings
    )
    machine, outcome = RunMachine(RunState(run_id=_RUN_ID, spec=spec)), Outcome()
    instructions = _enroll(machine, shards)
    while (stage := machine.state.stage) is not None and stage.kind == _KIND:
        if stage.closed:
            if Resolve(stage.name) not in instructions:
                raise ValueError(f"the stage {stage.name} is closed, and nothing was asked for")
            decision = decide(machine.state, stage)
            if isinstance(decision, Selection):
                outcome.selection = decision
                machine.handle(StageResolved(4.0, stage.name, CoresetsSelected(decision.coresets)))
                break
            if isinstance(decision, KMeansCenters):
                centers = np.array(decision.values, dtype=np.float32).reshape(-1, decision.dimension)
                outcome.centers.append(centers)
            instructions = machine.handle(StageResolved(3.0, stage.name, NextStep(decision)))
            continue
        tasks = {task.site: task for task in machine.state.tasks.values() if task.kind == _KIND}
        if not tasks:
            break
        instructions = []
        for site in order(sorted(tasks)):
            if (leaves or {}).get(site) == stage.step:
                instructions += machine.handle(TaskFailed(3.0, tasks[site].id, "gone"))
                continue
            report = _report(machine.state, tasks[site], shards[site], folder / site)
            # What the coordinator sees is what was serialized.
            outcome.reports.append((site, type(report).FromString(report.SerializeToString())))
            result = AnyMessage()
            result.Pack(report)
            if rejection := WORKFLOWS[_KIND].check(machine.state, tasks[site], result):
                raise ValueError(f"{tasks[site].id}: {rejection[1]}")
            instructions += machine.handle(ResultReceived(3.0, tasks[site].id, result))
    for site, coreset in outcome.selection.coresets.items():
        outcome.picks[site] = coreset_rows(coreset, rows=len(shards[site]), run_id=_RUN_ID, folder=folder / site)
    return outcome


def _enroll(machine: RunMachine, shards: Shards) -> list[Instruction]:
    for site in sorted(shards):
        machine.handle(SiteConnected(site, "", f"session {site}"))
    for site in sorted(shards):
        rows = len(shards[site])
        machine.handle(SiteRegistered(1.0, site, rows, not rows, {"weights": "w"}, _MANIFEST))
    return machine.handle(AdapterDrawn(2.0, Artifact("0" * 64, 1)))


def _report(state: RunState, task: Task, values: npt.NDArray[np.float32], folder: Path) -> Message:
    folder.mkdir(parents=True, exist_ok=True)
    strategy = state.spec.selection.strategy
    reporter = PrivateReporter(
        task.site, folder, Ledger(folder / "ledger.jsonl"), _RUN_ID, state.spec, None, allow_exact_kmeans_sums=True
    )
    request: Message | None = None
    packed = WORKFLOWS[_KIND].request(state, task)
    if isinstance(packed, AnyMessage) and strategy.request_type is not None:
        request = strategy.request_type()
        packed.Unpack(request)
    features = Features(np.arange(len(values)), values)
    context = SelectionContext(task.id, state.spec, len(values), lambda: features, reporter, request)
    return STRATEGIES[strategy.name].report(context)
