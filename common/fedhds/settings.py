"""Settings of a daemon from flags, FEDHDS_* environment and a YAML file, all made from one pydantic model.

pydantic-settings was tried: it takes 0.23 s to import (half of what --help may take) and cannot read several values
after one flag (`--data shards/*.jsonl`); what is left to do on top of argparse fits on two screens.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import signal
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedhds import __version__
from fedhds.errors import FedhdsError, SettingsError, UsageError

Model = TypeVar("Model", bound=BaseModel)
ENVIRONMENT_PREFIX = "FEDHDS_"


def flag(name: str) -> str:
    """The flag of a field: `wire_dtype` is `--wire-dtype`."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a field: `wire_dtype` is `FEDHDS_WIRE_DTYPE`."""
    return ENVIRONMENT_PREFIX + name.upper()


def addresses(server: str) -> list[str]:
    """Every HOST:PORT of a `--server`."""
    return [address.strip() for address in server.split(",")]


def is_loopback(host: str) -> bool:
    """Whether connections to `host` stay on this machine; a name other than localhost counts as outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_http(address: str, everybody: bool) -> None:
    """Raises ValueError when a `--http` is malformed, or open to other machines without `--http-open`."""
    if not address:
        return
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]+", port) or int(port) > 65535:
        raise ValueError(f"http: {address!r} is not HOST:PORT")
    if not is_loopback(host) and not everybody:
        raise ValueError(
            f"http: {host} is reachable from other machines, and everybody there could read what is served; listen on "
            "127.0.0.1, or say --http-open where a firewall decides who gets there"
        )


def load(
    model: type[Model],
    *,
    program: str,
    description: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> Model:
    """Builds `model` from `arguments`, `environment` and the file named by --config, the first named winning.

    Raises SettingsError that names the flag, variable or line at fault; exits on --help, --version and on flags
    that do not exist, as argparse does.
    """
    parser = _parser(model, program, description)
    given = vars(parser.parse_args(list(arguments)))
    config = given.pop("config", None) or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if config:
        for name, value in _read_file(Path(config), model).items():
            values[name], sources[name] = value, f"{config}: {name.replace('_', '-')}"
    for name, field in model.model_fields.items():
        text = environment.get(variable(name), "")
        if text:
            values[name] = text.split(",") if _is_many(field) else text
            sources[name] = variable(name)
    for name, value in given.items():
        values[name], sources[name] = value, flag(name)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explained(error, sources) from None


def reference(model: type[BaseModel]) -> str:
    """The settings as a Markdown table per group, for the configuration reference."""
    groups: dict[str, list[str]] = {}
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_shown(field.default)}`" if _shown(field.default) else ""
        allowed = _choices(field)
        text = (field.description or "") + (f" One of {', '.join(allowed)}." if allowed else "")
        row = f"| `{flag(name)}` | `{variable(name)}` | {default} | {text} |"
        groups.setdefault(_group(field), []).append(row)
    head = "| flag | environment | default | effect |\n| --- | --- | --- | --- |\n"
    return "\n\n".join(f"### {group}\n\n{head}" + "\n".join(rows) for group, rows in groups.items()) + "\n"


def _parser(model: type[BaseModel], program: str, description: str) -> argparse.ArgumentParser:
    # allow_abbrev off: an abbreviation that is unique today breaks the script of tomorrow.
    parser = _Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        epilog=f"Every setting is also an environment variable ({ENVIRONMENT_PREFIX}LIKE_THIS; lists by commas) and a "
        "key of the YAML file; a flag wins over the environment, the environment over the file.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of settings [{ENVIRONMENT_PREFIX}CONFIG]")
    sections: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        group = _group(field)
        if group not in sections:
            sections[group] = parser.add_argument_group(group)
        shown = "" if field.is_required() or not _shown(field.default) else f" (default {_shown(field.default)})"
        text = f"{field.description}{shown} [{variable(name)}]".replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        elif _is_many(field):
            options |= {"nargs": "+", "action": "extend", "metavar": _metavar(name, field)}
        elif _choices(field):
            options["choices"] = _choices(field)
        else:
            options["metavar"] = _metavar(name, field)
        sections[group].add_argument(flag(name), **options)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse says it, with the code of such errors."""
        super().error(f"{message} [{SettingsError.code}]")


def _read_file(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError("--config", f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError("--config", f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError("--config", f"{path} must hold settings, one `name: value` per line")
    values = {key.replace("-", "_"): value for key, value in content.items()}
    for name, field in model.model_fields.items():
        value = values.get(name)
        if isinstance(value, bool) and field.annotation is not bool:
            raise SettingsError(f"{path}: {name.replace('_', '-')}", f"{value} is no value for it; put it in quotes")
        if _is_many(field) and isinstance(value, str):
            values[name] = value.split(",")
        elif _inner(field) is str and isinstance(value, (int, float)):
            # `budget: 200` is a number to YAML.
            values[name] = str(value)
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        raise SettingsError(
            f"{path}: {unknown[0].replace('_', '-')}", "there is no such setting; --help lists them all"
        )
    return values


def _explained(error: ValidationError, sources: Mapping[str, str]) -> SettingsError:
    """The first problem, in the words of whoever set it."""
    problem = error.errors(include_url=False)[0]
    location = problem["loc"]
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not location:
        # A rule over several fields names the field at fault itself: "budget: ...".
        name, _, rest = message.partition(": ")
        return SettingsError(sources.get(name, flag(name)), rest)
    name = str(location[0])
    if problem["type"] == "missing":
        return SettingsError(flag(name), f"is required (or set {variable(name)})")
    return SettingsError(sources.get(name, flag(name)), f"{problem['input']!r} is not valid: {message}")


def _group(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) and "group" in extra else "General"


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None or value is PydanticUndefined else str(value)


def _inner(field: FieldInfo) -> Any:
    """The annotation without `| None`."""
    annotation = field.annotation
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _is_many(field: FieldInfo) -> bool:
    return get_origin(_inner(field)) in (tuple, list)


def _choices(field: FieldInfo) -> tuple[str, ...]:
    inner = _inner(field)
    return get_args(inner) if get_origin(inner) is Literal else ()


def _metavar(name: str, field: FieldInfo) -> str:
    inner = get_args(_inner(field))[0] if _is_many(field) else _inner(field)
    if inner is Path:
        return "PATH"
    return {int: "N", float: "X"}.get(inner, name.rsplit("_", 1)[-1].upper())


def run_main(program: str, body: typing.Callable[[], int]) -> NoReturn:
    """Runs a daemon's main function: domain errors become one line and an exit status, never a traceback.

    2: a mistake in what was asked for; 1: any other domain error; 130, 143: ended by
    Ctrl-C or SIGTERM before the daemon ran.
    """
    from fedhds.telemetry import last_words

    # Until the daemon handles it; the first process of a container would not hear it otherwise.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        status = body()
    except FedhdsError as error:
        last_words(program, error)
        status = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        last_words(program, "interrupted")
        status = 130
    sys.exit(status)
