"""docs/privacy.md against the wire contract: its list of what leaves a site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor

from fedhds.spec import STRATEGY_SPECS, RunSpec
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import secure_pb2, selection_pb2
from fedhds_client.tasks import TASKS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")


def fields(message: Descriptor) -> set[str]:
    """Names of all fields of a message and of the messages in it."""
    names = set()
    for field in message.fields:
        names.add(field.name)
        if field.message_type is not None:
            names |= fields(field.message_type)
    return names


def results() -> list[Descriptor]:
    """The messages that a site packs into `result`: one per kind of task, of a selection one per strategy."""
    assert set(TASKS) == {"select", "train", "secure-train", "evaluate", "validate"}
    specs = [RunSpec.of(model="m", rounds=1, selection_strategy=name) for name in STRATEGY_SPECS]
    kinds = [spec.selection.strategy.report_type for spec in specs]
    reports: list[Any] = [kind.DESCRIPTOR for kind in kinds if kind is not None]
    assert len(reports) == 5
    # What a filter asks for, whatever the strategy is.
    reports.append(selection_pb2.ScoreHistogram.DESCRIPTOR)
    steps = (
        secure_pb2.RoundKeys,
        secure_pb2.SealedShares,
        secure_pb2.MaskedUpdate,
        secure_pb2.SignedSurvivors,
        secure_pb2.UnmaskingShares,
    )
    secure = [step.DESCRIPTOR for step in steps]
    return [pb.TrainResult.DESCRIPTOR, pb.EvaluationResult.DESCRIPTOR, *reports, *secure]


def test_the_list_of_what_leaves_a_site_is_complete_and_says_no_more() -> None:
    service = pb.DESCRIPTOR.services_by_name["Federation"]
    sent = set().union(*(fields(message) for message in (*(each.input_type for each in service.methods), *results())))
    section = PAGE.partition("## What leaves a site")[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    listed = set(re.findall(r"`([a-z_]+)`", table))
    assert sent == listed
