"""All pages: links lead somewhere, and commands are such as the programs take, on files that are there."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from fedhds import settings
from fedhds.cli import toolbox
from fedhds.settings.loader import read
from fedhds_client.settings import ClientSettings
from fedhds_server.settings import ServerSettings
from fedhds_server.simulation.settings import simulation_settings
from fedhds_server.simulation.sweep import points
from tests.support.pages import PAGES, ROOT, anchors, commands, prose

DAEMONS: dict[str, type[BaseModel]] = {"fedhds-server": ServerSettings, "fedhds-client": ClientSettings}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def of(page: str, *programs: str) -> list[list[str]]:
    """The page's commands of some programs, which may be named with their folder."""
    return [words for words in commands(page) if PurePosixPath(words[0]).name in programs]


def toolbox_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command of `fedhds` that the words name, and its arguments."""
    command: Any = typer.main.get_command(toolbox.app)
    arguments = words[1:]
    while hasattr(command, "commands"):
        assert arguments, words
        command, arguments = command.get_command(typer.Context(command), arguments[0]), arguments[1:]
        assert command, words
    return command, arguments


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(str(found.resolve().relative_to(ROOT))), target


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_daemons_are_valid(page: str) -> None:
    for words in of(page, *DAEMONS):
        program = PurePosixPath(words[0]).name
        # Raises, or exits, on a flag or a value that is none.
        read = settings.load(DAEMONS[program], program=program, description="", arguments=words[1:], environment={})
        given = {word.removeprefix("--").replace("-", "_") for word in words[1:] if word.startswith("--")}
        assert given
        assert given <= set(settings.flat(read))


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_toolbox_exist_with_their_options(page: str) -> None:
    for words in of(page, "fedhds"):
        command, arguments = toolbox_command(words)
        if command.name == "simulate":
            settings_given = read(
                simulation_settings(), program="", description="", arguments=arguments, environment={}, sweeps=True
            )
            assert points(simulation_settings(), settings_given)
            continue
        # Parses without converting values: the files of the examples need not exist.
        command.make_parser(typer.Context(command)).parse_args(list(arguments))


@pytest.mark.parametrize("page", PAGES)
def test_options_that_the_text_gives_to_programs_exist(page: str) -> None:
    for quoted in re.findall(r"`((?:fedhds|fedhds-server|fedhds-client) [^`]+)`", prose(page)):
        words = quoted.split()
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        if words[0] in DAEMONS:
            known = {settings.flag(setting.name) for setting in settings.settings_of(DAEMONS[words[0]])}
            known |= {"--version", "--help"}
        elif words[1].startswith("--"):
            known = {"--version", "--help"}
        elif words[1].isupper():
            continue
        elif words[1] == "simulate":
            known = {settings.flag(setting.name) for setting in simulation_settings()} | {"--help"}
        else:
            context: Any = typer.main.get_command(toolbox.app)
            for word in words[1:]:
                if not hasattr(context, "commands"):
                    break
                context = context.get_command(typer.Context(context), word)
                assert context, quoted
            known = {option for parameter in context.params for option in parameter.opts} | {"--help"}
        assert options <= known, quoted


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    named = {words[1] for words in of(page, "make")} | set(re.findall(r"`make ([a-z][a-z0-9-]*)", prose(page)))
    for target in named:
        assert re.search(rf"^{target}:.*##", MAKEFILE, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_commands_name_exist(page: str) -> None:
    for words in commands(page):
        for word in words:
            if word.startswith(("deploy/", "demo/", "benchmarks/", "docs/", "tests/")):
                assert (ROOT / word).exists(), word
        if words[1:2] == ["-m"] and PurePosixPath(words[0]).name.startswith("python"):
            module = Path(*words[2].split("."))
            assert words[2] in ("venv", "pip") or (ROOT / module).with_suffix(".py").exists(), words


def test_commands_are_found_where_pages_have_them() -> None:
    # What finds none would let everything above pass.
    assert of("README.md", "fedhds-server")
    assert of("README.md", "fedhds-client")
    assert ["make", "demo"] in commands("README.md")
    assert len(of("docs/two-hosts.md", "fedhds")) >= 7
    assert any("deploy/kubernetes/example" in words for words in of("docs/kubernetes.md", "kubectl"))
    assert of("docs/compose.md", "docker")


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = set(), {"README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for target in re.findall(r"\]\(([^)#]+)", prose(page)):
            if target.startswith("https://"):
                continue
            found = ((ROOT / page).parent / target).resolve()
            linked = sorted(found.glob("*.md")) if found.is_dir() else [found]
            new |= {name for path in linked if (name := str(path.relative_to(ROOT))) in PAGES} - reached
    assert reached == set(PAGES)
