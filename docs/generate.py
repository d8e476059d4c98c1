"""Writes what of docs/ is made from the code itself; a test fails when a file is out of date."""

from __future__ import annotations

import re
from pathlib import Path

from fedhds.runtime import metrics
from fedhds.runtime.metrics import LOOP_LAG
from fedhds.settings import reference
from fedhds_client import counters as client_counters
from fedhds_client import metrics as client_metrics
from fedhds_client.settings import ClientSettings
from fedhds_server import counters as server_counters
from fedhds_server import metrics as server_metrics
from fedhds_server.settings import ServerSettings

TARGET = Path(__file__).with_name("configuration.md")
OPERATIONS = Path(__file__).with_name("operations.md")
_METRICS = re.compile(r"(?<=<!-- metrics: made by `make docs` -->\n).*(?=<!-- end of metrics -->)", re.DOTALL)


def configuration() -> str:
    """The configuration reference, Markdown."""
    return (
        "# Configuration reference\n\n"
        "`make docs` writes this page from the settings. Every setting is a flag, an environment variable and a\n"
        "key of the YAML file given by `--config` (the flag's name without dashes in front). A flag wins over the\n"
        "environment, the environment over the file. A list is several values after one flag, values separated by\n"
        "commas in the environment, and a list in the file. The file is read as it is written: `name: 0123` is the\n"
        "name 0123, `no` a text like any other; `~`, `null` and nothing mean no value.\n\n"
        f"## fedhds-server\n\n{reference(ServerSettings)}\n## fedhds-client\n\n{reference(ClientSettings)}"
    )


def operations() -> str:
    """docs/operations.md with its tables of metrics as the code has them now."""
    server = metrics.reference(server_metrics.MEASURES, (*server_counters.COUNTED, LOOP_LAG))
    client = metrics.reference(client_metrics.MEASURES, (*client_counters.COUNTED, LOOP_LAG))
    tables = f"\n### Of fedhds-server\n\n{server}\n### Of fedhds-client\n\n{client}\n"
    return _METRICS.sub(lambda _: tables, OPERATIONS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    TARGET.write_text(configuration(), encoding="utf-8")
    OPERATIONS.write_text(operations(), encoding="utf-8")
