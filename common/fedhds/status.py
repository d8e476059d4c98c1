"""A run's status as plain data, for `fedhds status --json`, the dashboard and report.json."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format

from fedhds.v2 import status_pb2


def status_dict(status: status_pb2.GetStatusResponse) -> dict[str, Any]:
    """The message with the types of JSON; the run's specification is an object and not text."""
    content: dict[str, Any] = json_format.MessageToDict(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return content | {"spec": json.loads(status.spec or "{}")}
