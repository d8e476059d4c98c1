"""The run's state machine as tests drive it: events by site, and what it asks for."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_server.run.activity import activity
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    AdapterUpdated,
    CoresetsSelected,
    Instruction,
    NextStep,
    Outcome,
    Record,
    ResultReceived,
    SiteConnected,
    SiteRegistered,
    StageResolved,
    TaskFailed,
    Wake,
)
from fedhds_server.run.state import RunState, Stage
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2)})
ALL_ROWS = selection_pb2.Coreset(all=selection_pb2.AllRows())


def artifact(number: int) -> Artifact:
    return Artifact(f"{number:064x}", 100)


def packed_any(message: Message) -> Any:
    result = Any()
    result.Pack(message)
    return result


def machine(*, selection_strategy: str = "full", **settings: object) -> RunMachine:
    """A run that nobody has joined; by default its strategy asks no site for a report."""
    values = {"model": "m", "rounds": 2, "min_sites": 2, "evaluate_every": 0} | settings
    return RunMachine(RunState(run_id="r", spec=RunSpec.of(selection_strategy=selection_strategy, **values)))


def join(
    run: RunMachine, site: str, rows: int = 10, *, evaluates: bool = False, validation_rows: int = 0
) -> list[Instruction]:
    run.handle(SiteConnected(site, "", "s" + site))
    registered = SiteRegistered(1.0, site, rows, evaluates, {"weights": "w"}, MANIFEST, validation_rows=validation_rows)
    return run.handle(registered)


def enrolled(sites: str = "ab", **settings: object) -> RunMachine:
    """A run that has begun with `sites`: its first stage is open, or closed where sites are asked for no report."""
    run = machine(**{"min_sites": len(sites)} | settings)  # type: ignore[arg-type]
    for site in sites:
        join(run, site)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    return run


def started(sites: str = "ab", **settings: object) -> RunMachine:
    """The same, and the selection gave each site all of its rows."""
    run = enrolled(sites, **settings)
    if doing(run) == "grouping":
        select(run, sites)
    return run


def stage_of(run: RunMachine) -> Stage:
    assert run.state.stage
    return run.state.stage


def received(run: RunMachine, task_id: str, message: Message, upload: Artifact | None = None) -> list[Instruction]:
    return run.handle(ResultReceived(4.0, task_id, packed_any(message), upload))


def report(run: RunMachine, site: str, message: Message | None = None) -> list[Instruction]:
    return received(run, stage_of(run).task_id(site), message or selection_pb2.ClusterReport())


def update(
    run: RunMachine, site: str, number: int = 7, samples: int = 5, loss: float | None = 1.0
) -> list[Instruction]:
    result = pb.TrainResult(update=artifact(number).to_proto(), samples=samples, loss=loss)
    return received(run, f"train/{run.state.round_number}/{site}", result, artifact(number))


def nothing(run: RunMachine, site: str) -> list[Instruction]:
    """The site has no row to train on."""
    return received(run, f"train/{run.state.round_number}/{site}", pb.TrainResult())


def fail(run: RunMachine, site: str) -> list[Instruction]:
    return run.handle(TaskFailed(4.0, f"train/{run.state.round_number}/{site}", "no memory"))


def evaluation(run: RunMachine, round_number: int, site: str) -> list[Instruction]:
    metrics = {"loss": pb.MetricSum(value_sum=8, weight=4), "rouge_l": pb.MetricSum(value_sum=1, weight=2)}
    return received(run, f"evaluate/{round_number}/{site}", pb.EvaluationResult(rows=2, metrics=metrics))


def validation(run: RunMachine, round_number: int, site: str, loss: float, tokens: int = 4) -> list[Instruction]:
    metrics = {"loss": pb.MetricSum(value_sum=loss * tokens, weight=tokens)}
    return received(run, f"validate/{round_number}/{site}", pb.EvaluationResult(rows=2, metrics=metrics))


def resolve(run: RunMachine, outcome: Outcome) -> list[Instruction]:
    """The answer to the instruction that asks what follows the closed stage."""
    return run.handle(StageResolved(5.0, stage_of(run).name, outcome))


def select(run: RunMachine, sites: str) -> list[Instruction]:
    return resolve(run, CoresetsSelected(dict.fromkeys(sites, ALL_ROWS)))


def step(run: RunMachine, *values: float) -> list[Instruction]:
    return resolve(run, NextStep(selection_pb2.KMeansCenters(dimension=1, values=values)))


def aggregate(run: RunMachine, number: int) -> list[Instruction]:
    return resolve(run, AdapterUpdated(artifact(number)))


def doing(run: RunMachine) -> str:
    """What the run does, or how it ended."""
    return activity(run.state)


def work(instructions: list[Instruction]) -> list[Instruction]:
    return [instruction for instruction in instructions if not isinstance(instruction, (Record, Wake))]


def notes(instructions: list[Instruction]) -> list[str]:
    return [instruction.message for instruction in instructions if isinstance(instruction, Record)]
