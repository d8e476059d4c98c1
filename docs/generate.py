"""Writes what of docs/ is made from the code itself; a test fails when a file is out of date."""

from __future__ import annotations

import re
from pathlib import Path

from fedhds import metrics
from fedhds.runtime.metrics import LOOP_LAG
from fedhds.settings import reference
from fedhds_client import counted as client_counted
from fedhds_client import metrics as client_metrics
from fedhds_client.settings import ClientSettings
from fedhds_server import counted as server_counted
from fedhds_server import metrics as server_metrics
from fedhds_server.settings import ServerSettings

TARGET = Path(__file__).with_name("configuration.md")
OPERATIONS = Path(__file__).with_name("operations.md")
_METRICS = re.compile(r"(?<=<!-- metrics: made by `make docs` -->\n).*(?=<!-- end of metrics -->)", re.DOTALL)


def configuration() -> str:
    """The configuration reference, Markdown."""
    return (
        "# Configuration reference\n\n"
        "Made by `make docs` from the settings themselves. Every setting is a flag, an environment variable and a\n"
        "key of the YAML file given by `--config` (the flag's name without dashes in front); a flag wins over the\n"
        "environment, the environment over the file. Lists are several values after one flag, divided by commas in\n"
        "the environment, and a list in the file.\n\n"
        f"## fedhds-server\n\n{reference(ServerSettings)}\n## fedhds-client\n\n{reference(ClientSettings)}"
    )


def operations() -> str:
    """docs/operations.md with its tables of metrics made anew."""
    server = metrics.reference(server_metrics.MEASURES, (*server_counted.COUNTED, LOOP_LAG))
    client = metrics.reference(client_metrics.MEASURES, (*client_counted.COUNTED, LOOP_LAG))
    tables = f"\n### Of fedhds-server\n\n{server}\n### Of fedhds-client\n\n{client}\n"
    return _METRICS.sub(lambda _: tables, OPERATIONS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    TARGET.write_text(configuration(), encoding="utf-8")
    OPERATIONS.write_text(operations(), encoding="utf-8")
