"""The README against the code: its commands, targets, links, and its list of what leaves a site."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from google.protobuf.descriptor import Descriptor
from pydantic import BaseModel

from fedhds import cli, settings
from fedhds.v1 import federation_pb2 as pb
from fedhds_client.settings import ClientSettings
from fedhds_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DAEMONS: dict[str, type[BaseModel]] = {"fedhds-server": ServerSettings, "fedhds-client": ClientSettings}


def commands() -> list[list[str]]:
    """Every command line of a code block, split into words."""
    blocks = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of(program: str) -> list[list[str]]:
    found = [words for words in commands() if words[0] == program]
    assert found, f"the README shows no {program}"
    return found


@pytest.mark.parametrize("program", DAEMONS)
def test_commands_of_the_daemons_are_valid(program: str) -> None:
    for words in of(program):
        # Raises, or exits, on a flag or a value that is none.
        read = settings.load(DAEMONS[program], program=program, description="", arguments=words[1:], environment={})
        given = {word.removeprefix("--").replace("-", "_") for word in words[1:] if word.startswith("--")}
        assert given == read.model_fields_set


def test_commands_of_the_toolbox_exist_with_their_options() -> None:
    toolbox: Any = typer.main.get_command(cli.app)
    for words in of("fedhds"):
        command, arguments = toolbox, words[1:]
        while hasattr(command, "commands"):
            command, arguments = command.get_command(typer.Context(command), arguments[0]), arguments[1:]
            assert command, words
        # Parses without converting values: the files of the examples need not exist.
        command.make_parser(typer.Context(command)).parse_args(list(arguments))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {words[1] for words in of("make")} | set(re.findall(r"`make ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:.*##", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


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
