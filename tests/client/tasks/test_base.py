"""What all tasks share: their kinds, and a request of the type that the kind has."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message

from fedhds import __version__
from fedhds.errors import TaskError
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_client.tasks import TASKS, TaskContext, task_kind


def context(kind: str, request: Message | None) -> TaskContext:
    task = pb.Task(id=f"{kind}/1/ward", round_number=1, kind=kind)
    if request is not None:
        task.request.Pack(request)
    rest: Any = [None] * 6
    return TaskContext(task, "run", *rest)


def test_a_request_of_the_expected_type_is_read() -> None:
    request = pb.TrainRequest(trainable_roles=["lora_B"])
    assert context("train", request).request(pb.TrainRequest) == request


@pytest.mark.parametrize(
    ("request_message", "name"),
    [(selection_pb2.KMeansCenters(dimension=3), "fedhds.v2.KMeansCenters"), (None, "none")],
)
def test_a_request_of_another_type_is_a_task_error_that_names_both(request_message: Message | None, name: str) -> None:
    with pytest.raises(TaskError) as caught:
        context("train", request_message).request(pb.TrainRequest)
    assert str(caught.value) == (
        f"the train task has a request of type {name}, but fedhds {__version__} expects fedhds.v2.TrainRequest; "
        "install the coordinator's version here"
    )


def test_every_kind_is_known_by_its_name_and_says_what_it_does() -> None:
    assert set(TASKS) == {"select", "train", "secure-train", "evaluate", "validate"}
    for name, kind in TASKS.items():
        assert task_kind(name) is kind
        assert kind.doing
    with pytest.raises(TaskError, match="knows no task 'unmask'; install the coordinator's version here"):
        task_kind("unmask")
