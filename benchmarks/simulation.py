"""A whole selection without network or model: both halves of a strategy and the state machine, on given features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from fedhds_client.selection.base import TargetRows
from fedhds_client.selection.coreset import coreset_rows
from fedhds_client.selection.pipeline import answer
from fedhds_client.selection.private_reporter import MIN_CLUSTER_ROWS, PrivateReporter
from fedhds_client.selection.scores import SCORES, ScoredRows
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    CoresetsSelected,
    Instruction,
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
    scores: Mapping[str, Mapping[str, npt.NDArray[np.floating]]] | None = None,
    targets: Mapping[str, npt.NDArray[np.float32]] | None = None,
    min_cluster_rows: int = MIN_CLUSTER_ROWS,
    **settings: Any,
) -> Outcome:
    """Runs one selection over `shards`, features float32 (n, d) per site; sites keep their state below `folder`.

    Sites answer in the `order` of their names; a site in `leaves` fails its task in the step of that number.
    `targets` are vectors of the target rows of some sites, `scores` those of filters that need texts: by the name of
    the filter and of the site, (n,). `settings` are the run's, by the names of their flags. Raises ValueError for a
    report that the coordinator rejects.
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
            if isinstance(decision.request, KMeansCenters):
                centers = np.array(decision.request.values, dtype=np.float32).reshape(-1, decision.request.dimension)
                outcome.centers.append(centers)
            instructions = machine.handle(StageResolved(3.0, stage.name, decision))
            continue
        tasks = {task.site: task for task in machine.state.tasks.values() if task.kind == _KIND}
        if not tasks:
            break
        instructions = []
        for site in order(sorted(tasks)):
            if (leaves or {}).get(site) == stage.step:
                instructions += machine.handle(TaskFailed(3.0, tasks[site].id, "gone"))
                continue
            own = {name: of[site] for name, of in (scores or {}).items()}
            report = _report(
                machine.state, tasks[site], shards[site], folder / site, own, targets or {}, min_cluster_rows
            )
            # What the coordinator sees is what was serialized.
            outcome.reports.append((site, type(report).FromString(report.SerializeToString())))
            result = AnyMessage()
            result.Pack(report)
            if rejection := WORKFLOWS[_KIND].check(machine.state, tasks[site], result):
                raise ValueError(f"{tasks[site].id}: {rejection[1]}")
            instructions += machine.handle(ResultReceived(3.0, tasks[site].id, result))
    for site, coreset in outcome.selection.coresets.items():
        number = 0 if spec.selection.one_shot else machine.state.round_number
        outcome.picks[site] = coreset_rows(
            coreset, rows=len(shards[site]), run_id=_RUN_ID, folder=folder / site, round_number=number
        )
    return outcome


def _enroll(machine: RunMachine, shards: Shards) -> list[Instruction]:
    for site in sorted(shards):
        machine.handle(SiteConnected(site, "", f"session {site}"))
    for site in sorted(shards):
        rows = len(shards[site])
        machine.handle(SiteRegistered(1.0, site, rows, not rows, {"weights": "w"}, _MANIFEST))
    return machine.handle(AdapterDrawn(2.0, Artifact("0" * 64, 1)))


def _report(
    state: RunState,
    task: Task,
    values: npt.NDArray[np.float32],
    folder: Path,
    scores: Mapping[str, npt.NDArray[np.floating]],
    targets: Mapping[str, npt.NDArray[np.float32]],
    min_cluster_rows: int,
) -> Message:
    folder.mkdir(parents=True, exist_ok=True)
    account = Ledger(folder / "ledger.db").account(task.site, lambda: [task.site.encode()])
    reporter = PrivateReporter(
        task.site,
        folder,
        account,
        _RUN_ID,
        state.spec,
        allow_exact_kmeans_sums=True,
        min_cluster_rows=min_cluster_rows,
    )
    features = Features(np.arange(len(values)), values)

    def score(name: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        if name in scores:
            return scores[name][ids]
        unused: Any = None
        return SCORES[name](ScoredRows(unused, unused, unused, lambda: features), ids)

    request = WORKFLOWS[_KIND].request(state, task)
    assert request is None or isinstance(request, AnyMessage)
    target = None
    if task.site in targets:
        wanted = Features(np.arange(len(targets[task.site])), targets[task.site])
        own = account.ledger.account(f"{task.site} target", lambda: [f"{task.site} target".encode()])
        target = TargetRows(lambda: wanted, lambda: wanted, replace(reporter, account=own, own_unit="client"))
    context = SelectionContext(
        task.id,
        state.spec,
        len(values),
        lambda: features,
        reporter,
        # Gradients are vectors of length 1 as features are.
        gradients=lambda ids: features if ids is None else Features(ids, values[ids]),
        target=target,
    )
    return answer(context, request, strategies=STRATEGIES, scores=score, round_number=task.round_number)
