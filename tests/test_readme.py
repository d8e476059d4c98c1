"""The README against the wire contract: its list of what leaves a site. What holds for every page: tests/docs."""

from __future__ import annotations

import re
from pathlib import Path

from google.protobuf.descriptor import Descriptor

from fedhds.v2 import federation_pb2 as pb

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def fields(message: Descriptor) -> set[str]:
    """Names of all fields of a message and of the messages in it."""
    names = set()
    for field in message.fields:
        names.add(field.name)
        if field.message_type is not None:
            names |= fields(field.message_type)
    return names


def test_the_list_of_what_leaves_a_site_is_complete_and_says_no_more() -> None:
    service = pb.DESCRIPTOR.services_by_name["Federation"]
    sent = set().union(*(fields(method.input_type) for method in service.methods))
    section = README.partition("## What leaves a site")[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    listed = set(re.findall(r"`([a-z_]+)`", table))
    assert sent == listed
