"""Settings of a daemon from flags, FEDHDS_* environment and a YAML file, all made from one pydantic model.

pydantic-settings was tried: it takes 0.23 s to import (half of what --help may take) and cannot read several values
after one flag (`--data shards/*.jsonl`); what is left to do on top of argparse fits on two screens.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedhds import __version__
from fedhds.encoding import not_utf_8
from fedhds.errors import SettingsError
from fedhds.settings.flatten import Setting, VariantError, active, nested, settings_of
from fedhds.settings.kinds import choices, default_text, inner, is_many
from fedhds.settings.names import ENVIRONMENT_PREFIX, flag, key, variable

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """What a person gave: values by the names of settings, and the flag, variable or line of each."""

    values: dict[str, Any]
    sources: dict[str, str]


def load(
    model: type[Model],
    *,
    program: str,
    description: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> Model:
    """Builds `model` from `arguments`, `environment` and the file named by --config, the first of these winning.

    Raises SettingsError that names the flag, variable or line at fault; exits on --help, --version and on flags
    that do not exist, as argparse does.
    """
    settings = settings_of(model)
    given = read(settings, program=program, description=description, arguments=arguments, environment=environment)
    return build(model, settings, given)


def read(
    settings: Sequence[Setting],
    *,
    program: str,
    description: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    sweeps: bool = False,
) -> Given:
    """What is given for `settings`; raises SettingsError and exits as `load` does.

    With `sweeps` a flag takes any text, also where its setting is one of a list: the text may stand for several values.
    """
    flags = vars(_parser(settings, program, description, sweeps).parse_args(list(arguments)))
    config = flags.pop("config", None) or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if config:
        for name, value in _read_file(Path(config), settings).items():
            values[name], sources[name] = value, f"{config}: {key(name)}"
    for setting in settings:
        name, text = setting.name, environment.get(variable(setting.name), "")
        if text:
            values[name] = text.split(",") if is_many(setting.field) else text
            sources[name] = variable(name)
    for name, value in flags.items():
        values[name], sources[name] = value, flag(name)
    for setting in settings:
        if _is_broken_text(setting, values.get(setting.name)):
            raise SettingsError(sources[setting.name], "it has bytes that are not UTF-8; write it in UTF-8")
    return Given(values, sources)


def build(model: type[Model], settings: Sequence[Setting], given: Given) -> Model:
    """The model with what is given for `settings`, which are its own; raises SettingsError."""
    try:
        return model.model_validate(nested(settings, given.values))
    except VariantError as error:
        raise SettingsError(given.sources[error.setting], error.reason) from None
    except ValidationError as error:
        raise _explained(error, active(settings, given.values), given.sources) from None


def _parser(
    settings: Sequence[Setting], program: str, description: str, sweeps: bool = False
) -> argparse.ArgumentParser:
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
    for setting in settings:
        name, field = setting.name, setting.field
        if setting.group not in sections:
            sections[setting.group] = parser.add_argument_group(setting.group)
        default = "" if field.is_required() or not default_text(field) else f" (default {default_text(field)})"
        text = f"{setting.description}{default} [{variable(name)}]".replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        elif is_many(field):
            options |= {"nargs": "+", "action": "extend", "metavar": _metavar(setting)}
        elif choices(field) and not sweeps:
            options["choices"] = choices(field)
        else:
            options["metavar"] = _metavar(setting)
        sections[setting.group].add_argument(flag(name), **options)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse says it, with the code of such errors."""
        super().error(f"{message} [{SettingsError.code}]")


def _metavar(setting: Setting) -> str:
    kind = inner(setting.field)
    if is_many(setting.field):
        kind = get_args(kind)[0]
    if kind is Path:
        return "PATH"
    return {int: "N", float: "X"}.get(kind, setting.name.rsplit("_", 1)[-1].upper())


def _read_file(path: Path, settings: Sequence[Setting]) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads every value but null as the text that is written, which then means what it means after a flag.

        YAML's own types turn the name 0123 into 83, the name `no` into False and 1:20 into 80.
        """

        yaml_implicit_resolvers = {  # noqa: RUF012 - declared so by PyYAML
            first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            """Refuses a second value for a setting, which YAML would take in silence."""
            names = [str(name.value).replace("-", "_") for name, _ in node.value]
            for index, (name, _) in enumerate(node.value):
                if names[index] in names[:index]:
                    raise yaml.constructor.ConstructorError(None, None, f"{name.value} is set twice", name.start_mark)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise SettingsError("--config", f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError("--config", f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise SettingsError("--config", f"{path} must hold settings, one `name: value` per line")
    values = {name.replace("-", "_"): value for name, value in content.items()}
    for setting in settings:
        value = values.get(setting.name)
        if is_many(setting.field) and isinstance(value, str):
            values[setting.name] = value.split(",")
    unknown = sorted(values.keys() - {setting.name for setting in settings})
    if unknown:
        raise SettingsError(f"{path}: {key(unknown[0])}", "there is no such setting; --help lists them all")
    return values


def _is_broken_text(setting: Setting, value: object) -> bool:
    """Whether a text is not UTF-8; names of files need not be."""
    texts = value if isinstance(value, list) else [value]
    kind = inner(setting.field)
    return Path not in (kind, *get_args(kind)) and any(not_utf_8(text) for text in texts if isinstance(text, str))


def _explained(error: ValidationError, settings: Sequence[Setting], sources: Mapping[str, str]) -> SettingsError:
    """The first problem, under the name by which the setting at fault was given."""
    problem = error.errors(include_url=False)[0]
    location = tuple(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")

    def at(name: str, reason: str) -> SettingsError:
        return SettingsError(sources.get(name, flag(name)), reason)

    for setting in settings:
        if setting.path == location[: len(setting.path)]:
            if problem["type"] == "missing":
                return SettingsError(flag(setting.name), f"is required (or set {variable(setting.name)})")
            return at(setting.name, f"{problem['input']!r} is not valid: {message}")
    # A rule over several fields names the setting at fault itself: "selection_budget: ...".
    name, _, rest = message.partition(": ")
    if any(setting.name == name for setting in settings):
        return at(name, rest)
    for setting in settings:
        if setting.variants and setting.path[:-1] == location[: len(setting.path) - 1]:
            return at(setting.name, message)
    return SettingsError(".".join(location) or "settings", message)
