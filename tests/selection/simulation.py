"""A whole selection without network or model: the real halves of a strategy and the real state machine, on features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhds.privacy.ledger import Ledger
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import selection_pb2
from fedhds_client.features.extraction import Features
from fedhds_client.selection import REPORTING, SelectionContext
from fedhds_client.selection.coreset import coreset_rows
from fedhds_client.selection.private_reporter import PrivateReporter
from fedhds_server.coordinator import decide
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    Instruction,
    PassOpened,
    ReportReceived,
    Select,
    SelectionMade,
    SiteConnected,
    SiteRegistered,
    TaskFailed,
)
from fedhds_server.run.state import RunState, Task, TaskKind
from fedhds_server.selection import STRATEGIES, Selection, cells
from tests.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2)})
Shards = Mapping[str, npt.NDArray[np.float32]]


@dataclass
class Outcome:
    """What came of a selection."""

    picks: dict[str, tuple[int, ...]]
    """Row ids per site, as the site resolves its coreset."""
    selection: Selection
    centers: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """Centers of every pass after the first."""
    reports: list[tuple[str, selection_pb2.ClusterReport | selection_pb2.KMeansStats]] = field(default_factory=list)
    """All that left sites, in order."""

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
    """Runs one selection over `shards`, (n, d) features per site.

    Sites answer in the `order` of their names; a site in `leaves` fails its task in the pass of that number.
    """
    dimension = next(iter(shards.values())).shape[1]
    values = {
        "model": "m",
        "rounds": 1,
        "strategy": strategy,
        "feature_dimension": dimension,
        "min_sites": sum(len(values) > 0 for values in shards.values()),
    }
    spec = RunSpec.model_validate(values | settings)
    half = STRATEGIES[strategy]
    machine = RunMachine(RunState(run_id="run", spec=spec), needs_reports=half.needs_reports)
    for site in sorted(shards):
        machine.handle(SiteConnected(site, "", f"session {site}"))
    pending: list[Instruction] = []
    for site in sorted(shards):
        rows = len(shards[site])
        pending += machine.handle(SiteRegistered(1.0, site, rows, not rows, {"weights": "w"}, MANIFEST))
    pending += machine.handle(AdapterDrawn(2.0, Artifact("0" * 64, 1)))
    outcome = Outcome({}, Selection({}))
    while True:
        wanted = [instruction for instruction in pending if isinstance(instruction, Select)]
        pending = []
        if wanted:
            decided = decide(machine.state, half, wanted[0])
            if isinstance(decided, Selection):
                outcome.selection = decided
                machine.handle(SelectionMade(4.0, 0, dict(decided.coresets)))
                break
            outcome.centers.append(np.array(decided.values, dtype=np.float32).reshape(-1, decided.dimension))
            pending += machine.handle(PassOpened(3.0, 0, machine.state.selection_pass, decided))
            continue
        tasks = {task.site: task for task in machine.state.tasks.values() if task.kind is TaskKind.SELECT}
        if not tasks:
            break
        for site in order(sorted(tasks)):
            if (leaves or {}).get(site) == machine.state.selection_pass:
                pending += machine.handle(TaskFailed(3.0, tasks[site].id, "gone"))
                continue
            report = _report(machine.state, tasks[site], shards[site], folder / site)
            outcome.reports.append((site, report))
            pending += machine.handle(ReportReceived(3.0, tasks[site].id, report))
    for site, coreset in outcome.selection.coresets.items():
        outcome.picks[site] = coreset_rows(coreset, rows=len(shards[site]), run_id="run", folder=folder / site)
    return outcome


def _report(
    state: RunState, task: Task, values: npt.NDArray[np.float32], folder: Path
) -> selection_pb2.ClusterReport | selection_pb2.KMeansStats:
    folder.mkdir(parents=True, exist_ok=True)
    releases = PrivateReporter(
        task.site, folder, Ledger(folder / "ledger.jsonl"), "run", state.spec, None, share_exact_cells=True
    )
    features = Features(np.arange(len(values)), values)
    context = SelectionContext(task.id, state.spec, len(values), lambda: features, releases, state.centers_now)
    report = REPORTING[state.spec.selection.strategy.name].report(context)
    if isinstance(report, selection_pb2.KMeansStats):
        assert cells.check(report, state.spec, centers=state.centers_now, rows=len(values)) == ""
    # What the coordinator sees is what was serialized.
    return type(report).FromString(report.SerializeToString())
