"""The task loop of a site: what it makes of answers, and what ends a task but not the site."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import Message

from fedhds import __version__
from fedhds.errors import ArtifactError, DataError, EnrollmentRefused
from fedhds.spec import RunSpec
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.computation import ComputeThread
from fedhds_client.counters import ENROLLING
from fedhds_client.progress import ProgressDisplay
from fedhds_client.site import Site
from fedhds_client.site_loop import SiteLoop
from fedhds_client.tasks import TaskResult
from fedhds_client.updates.update import FinishedUpdate, UpdateMetadata

DIGEST = "0" * 64
SPEC = RunSpec.of(model="m", rounds=1)


class Coordinator:
    """A coordinator that has lost the first `losses` uploads when it is told that they are complete.

    It gives out `tasks` one after the other and then says that the run is over. `answers` are what it says of their
    results; when there are no more, it accepts.
    """

    def __init__(
        self,
        *,
        losses: int = -1,
        tasks: tuple[pb.Task, ...] = (),
        spec: str = "",
        answers: tuple[pb.CompleteTaskResponse, ...] = (),
    ) -> None:
        self.federation = SimpleNamespace(**{name: name for name in ("Enroll", "Register", "NextTask", "CompleteTask")})
        self.federation.FailTask, self.federation.ConfirmDelivery = "FailTask", "ConfirmDelivery"
        self.calls: list[tuple[str, Any]] = []
        self.uploads = 0
        self._losses = losses
        self._tasks = list(tasks)
        self._answers = list(answers)
        self._spec = spec or SPEC.model_dump_json()

    async def upload(self, *_: object) -> None:
        self.uploads += 1

    async def call(self, method: str, request: Message, *, wait_s: float = 0.0) -> Any:
        self.calls.append((method, request))
        match method:
            case "Register":
                return pb.RegisterResponse()
            case "Enroll":
                return pb.EnrollResponse(session="s", run_id="run", spec=self._spec, heartbeat_timeout_s=60)
            case "NextTask" if self._tasks:
                return pb.NextTaskResponse(task=self._tasks.pop(0))
            case "NextTask":
                return pb.NextTaskResponse(done=pb.Done(outcome="completed"))
            case "CompleteTask" if self.uploads <= self._losses:
                raise ArtifactError("the update was damaged where it was kept; upload it again")
            case "CompleteTask":
                return self._answers.pop(0) if self._answers else pb.CompleteTaskResponse(accepted=True)
        return None

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]


class Executor:
    """Gives every task the same result, and notes the tasks."""

    def __init__(self, folder: Path, result: TaskResult) -> None:
        self.tasks: list[str] = []
        self.fetches = 0
        self.unfit: DataError | None = None
        self._folder, self._result = folder, result

    def prepare(self, spec: RunSpec) -> Any:
        assert spec == SPEC
        return pb.ModelFingerprint(), SimpleNamespace(to_proto=pb.AdapterManifest)

    def judge(self, site: Site, run_id: str, control: object) -> int:
        if self.unfit:
            raise self.unfit
        return site.rows

    async def fetch(self, *_: object) -> Path:
        self.fetches += 1
        return self._folder / "adapter"

    def execute(self, site: Site, run_id: str, task: pb.Task, adapter: Path, control: object) -> TaskResult:
        self.tasks.append(task.id)
        return self._result


@pytest.fixture
def worker() -> Iterator[ComputeThread]:
    with ComputeThread() as pool:
        yield pool


def loop_of(folder: Path, worker: ComputeThread, coordinator: Coordinator, executor: Executor) -> SiteLoop:
    site: Any = Site("ward", folder, None, None, SimpleNamespace())  # type: ignore[arg-type]
    settings = SimpleNamespace(reconnect_timeout=60.0, out=folder / "out")
    parts: Any = (site, coordinator, executor, worker, settings, ProgressDisplay())
    return SiteLoop(*parts)


@pytest.mark.parametrize(("losses", "accepted"), [(0, True), (1, True), (2, False)])
async def test_an_update_that_the_coordinator_lost_is_uploaded_once_more(
    tmp_path: Path, worker: ComputeThread, losses: int, accepted: bool
) -> None:
    path = tmp_path / "update"
    path.touch()
    metadata = UpdateMetadata(DIGEST, 1, samples=1, loss=1.0, seconds=1.0, truncated=0, round_number=1)
    update = FinishedUpdate(path, metadata)
    coordinator = Coordinator(losses=losses)
    loop = loop_of(tmp_path, worker, coordinator, Executor(tmp_path, TaskResult(update.result(), update)))
    task = pb.Task(id="train/1/ward", round_number=1, kind="train")
    if accepted:
        assert (await loop._result(task)).accepted
    else:
        with pytest.raises(ArtifactError, match="upload it again"):
            await loop._result(task)
    assert coordinator.uploads == min(losses + 1, 2)
    # Until it is accepted, a restarted site loads it.
    assert path.exists() != accepted
    result = pb.TrainResult()
    assert coordinator.requests("CompleteTask")[-1].result.Unpack(result)
    assert result == update.result()


async def test_a_task_of_an_unknown_kind_fails_and_the_site_goes_on(tmp_path: Path, worker: ComputeThread) -> None:
    # Such a task may have no adapter to fetch.
    tasks = (pb.Task(id="unmask/1/ward", round_number=1, kind="unmask"), pb.Task(id="evaluate/1/ward", kind="evaluate"))
    coordinator = Coordinator(tasks=tasks)
    executor = Executor(tmp_path, TaskResult(pb.EvaluationResult(rows=3)))
    loop = loop_of(tmp_path, worker, coordinator, executor)
    assert loop.activity == ENROLLING
    assert await loop.run()
    (failure,) = coordinator.requests("FailTask")
    assert (failure.session, failure.task_id, failure.kind) == ("s", "unmask/1/ward", "TaskError")
    assert failure.reason == f"fedhds {__version__} knows no task 'unmask'; install the coordinator's version here"
    assert executor.tasks == ["evaluate/1/ward"]
    assert executor.fetches == 1
    assert [request.task_id for request in coordinator.requests("CompleteTask")] == ["evaluate/1/ward"]
    assert len(coordinator.requests("ConfirmDelivery")) == 1


async def test_a_site_whose_rows_do_not_fit_the_run_ends_before_it_registers(
    tmp_path: Path, worker: ComputeThread
) -> None:
    coordinator = Coordinator()
    executor = Executor(tmp_path, TaskResult(pb.TrainResult()))
    executor.unfit = DataError(tmp_path / "rows.jsonl", "private", 3, public_reason="the template refuses its turns")
    loop = loop_of(tmp_path, worker, coordinator, executor)
    with pytest.raises(DataError):
        await loop.run()
    assert [name for name, _ in coordinator.calls] == ["Enroll"]
    assert loop.failure == (
        "DataError",
        "line 3 of its data cannot be used: the template refuses its turns; the site's log has the details",
    )


ACCEPTED = pb.CompleteTaskResponse(accepted=True)
LATE = pb.CompleteTaskResponse(reason="the task is closed; its result came too late to count")
REJECTED = pb.CompleteTaskResponse(reason="the update is rejected: q holds values that are not finite", rejected=True)


@pytest.mark.parametrize(
    ("kinds", "answers", "ends_well", "words"),
    [
        (
            "train train",
            (REJECTED, REJECTED),
            False,
            "every task of this site failed (2 of them); the run ended without it",
        ),
        (
            "train train",
            (REJECTED, LATE),
            False,
            "every task of this site failed (1 of them); the run ended without it",
        ),
        ("train train", (REJECTED, ACCEPTED), True, ""),
        ("train train", (LATE, LATE), True, ""),
        (
            "select train train",
            (ACCEPTED, REJECTED, REJECTED),
            False,
            "every train task of this site failed (2 of them); the run ended without their results",
        ),
    ],
)
async def test_a_rejected_result_is_a_failure_of_the_site_and_a_late_one_is_not(
    tmp_path: Path,
    worker: ComputeThread,
    caplog: pytest.LogCaptureFixture,
    kinds: str,
    answers: tuple[pb.CompleteTaskResponse, ...],
    ends_well: bool,
    words: str,
) -> None:
    tasks = tuple(pb.Task(id=f"{kind}/{i}/ward", round_number=i, kind=kind) for i, kind in enumerate(kinds.split()))
    coordinator = Coordinator(tasks=tasks, answers=answers)
    loop = loop_of(tmp_path, worker, coordinator, Executor(tmp_path, TaskResult(pb.TrainResult())))
    assert await loop.run() == ends_well
    assert len(coordinator.requests("CompleteTask")) == len(tasks)
    rejections = [record for record in caplog.records if "the coordinator rejected the result" in record.message]
    assert len(rejections) == answers.count(REJECTED)
    if words:
        assert f"{words}; the last failure: ResultRejected: {REJECTED.reason}" in caplog.text
    assert ("of this site failed" in caplog.text) == bool(words)


def _changed(**fields: object) -> str:
    return json.dumps(json.loads(SPEC.model_dump_json()) | fields)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_changed(schema_version=3), "schema_version: the run's specification has schema 3, and fedhds "),
        (
            _changed(selection={"strategy": {"name": "novel"}}),
            "selection.strategy: 'novel' is not a known selection strategy; choose one of full, random, ",
        ),
        (_changed(peft={"method": "novel"}), "peft: 'novel' is not a known PEFT method"),
        (_changed(novel=1), "novel: Extra inputs are not permitted"),
        ("{", "Invalid JSON"),
    ],
)
async def test_a_specification_that_this_version_does_not_know_is_refused_with_the_reason(
    tmp_path: Path, worker: ComputeThread, spec: str, reason: str
) -> None:
    coordinator = Coordinator(spec=spec)
    executor = Executor(tmp_path, TaskResult(pb.EvaluationResult()))
    with pytest.raises(EnrollmentRefused) as caught:
        await loop_of(tmp_path, worker, coordinator, executor).run()
    message = str(caught.value)
    assert message.startswith(f"fedhds {__version__} cannot read the run's specification: {reason}")
    assert message.endswith("; install the coordinator's version here")
    assert "Value error" not in message
    assert [name for name, _ in coordinator.calls] == ["Enroll"]
