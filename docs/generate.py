"""Writes docs/configuration.md from the settings themselves; a test fails when the file is out of date."""

from __future__ import annotations

from pathlib import Path

from fedhds.settings import reference
from fedhds_client.settings import ClientSettings
from fedhds_server.settings import ServerSettings

TARGET = Path(__file__).with_name("configuration.md")


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


if __name__ == "__main__":
    TARGET.write_text(configuration(), encoding="utf-8")
