"""Runs in mid-round without processes, what leads them and what shows them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fedhds.runtime.http import served
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, Initial, TensorSpec
from fedhds_server.coordinator import Coordinator
from fedhds_server.dashboard.dashboard import Dashboard
from fedhds_server.leadership.gate import LeaderGate
from fedhds_server.leadership.leadership import Leadership
from fedhds_server.leadership.readiness import Readiness
from fedhds_server.run.state import (
    ClosedRound,
    Evaluation,
    MetricSum,
    Phase,
    Reply,
    RunState,
    Site,
    SiteState,
    Stage,
    Task,
    packed,
)
from fedhds_server.storage.artifacts import ArtifactStore
from tests.support.stores import Place

ADAPTER = Artifact("0" * 64, 1000)
MANIFEST = AdapterManifest((TensorSpec("q.lora_A.weight", (1, 1), "lora_A", Initial.zeros(), None),), "{}")


METRICS = {"loss": MetricSum(value_sum=16.0, weight=8), "rouge_l": MetricSum(value_sum=2.0, weight=4)}


def of_sites(count: int, rounds: int = 3) -> RunState:
    """A training run in mid-round."""
    names = [f"site-{number}" for number in range(count)]
    return RunState(
        run_id="r",
        spec=RunSpec.of(model="m", rounds=9),
        phase=Phase.RUNNING,
        round_number=rounds + 1,
        sites={name: Site(name=name, state=SiteState.ENROLLED, rows=5, bytes_received=7) for name in names},
        stage=Stage(
            kind="train",
            round_number=rounds + 1,
            cohort=names,
            target=count,
            replies={names[0]: Reply(task_id=f"train/{rounds + 1}/{names[0]}", artifact=ADAPTER)},
        ),
        adapters={rounds: ADAPTER},
        manifest=packed(MANIFEST.to_proto()),
        closed_rounds=[
            ClosedRound(round_number=number, cohort=names, contributions=dict.fromkeys(names, 1), loss=0.5, seconds=2.0)
            for number in range(1, rounds + 1)
        ],
        evaluations={rounds: {names[0]: Evaluation(rows=4, metrics=METRICS)}},
    )


def leading(state: RunState, place: Place, folder: Path) -> Readiness:
    store = place.leading()
    gate = LeaderGate()
    artifacts = ArtifactStore(folder / "artifacts", largest_upload=1 << 20)
    gate._coordinator = Coordinator(state, store=store, artifacts=artifacts, folder=folder)
    return Readiness(store, folder, gate)


@asynccontextmanager
async def page_of(coordinator: Coordinator | None, place: Place, *, loopback: bool = True) -> AsyncIterator[str]:
    """The URL at which the dashboard is served."""
    gate = LeaderGate()
    gate._coordinator = coordinator
    leadership = Leadership(place.open(), "h", "h:1")
    leadership.leader = "" if coordinator else "fed2.example.org:8470"
    page = Dashboard(gate, leadership, loopback=loopback)
    async with served("127.0.0.1:0", list, dict, page.routes) as url:
        try:
            yield url
        finally:
            page.close()
    leadership.close()


def large(sites: int, rounds: int) -> RunState:
    state = of_sites(sites, rounds)
    state.spec = state.spec.replace(rounds=2 * rounds)
    names = list(state.sites)
    # In place of whole cohorts, which no run of this size has.
    state.closed_rounds = [
        ClosedRound(
            round_number=number, cohort=names[:50], contributions=dict.fromkeys(names[:50], 1), loss=0.5, seconds=2.0
        )
        for number in range(1, rounds + 1)
    ]
    state.evaluations = dict.fromkeys(range(rounds + 1), state.evaluations[rounds])
    for name in names[-30:]:
        state.sites[name].last_error = "RuntimeError: " + 480 * "x"
    for name in names[100:140]:
        state.tasks[f"t-{name}"] = Task(id=f"t-{name}", kind="train", round_number=state.round_number, site=name)
    return state
