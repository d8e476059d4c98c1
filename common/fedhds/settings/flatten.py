"""Nested models as a flat list of settings, and flat values as nested ones.

People set `--lora-rank` and `rounds: 3`; the code reads `spec.peft.rank` and `spec.rounds.count`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedhds.settings.variants import Variants


@dataclass(frozen=True, slots=True)
class Setting:
    """One value that people set, and where the model has it."""

    name: str
    """Its flat name; no two settings share one."""
    path: tuple[str, ...]
    """Names of the attributes that lead to it."""
    field: FieldInfo
    group: str
    owners: tuple[str, ...] = ()
    """The variants that have this parameter; empty: it is no variant's."""
    variants: Variants | None = None
    """What this setting chooses between, if it is the name of a variant."""

    @property
    def description(self) -> str:
        """Its effect, for `--help` and the documentation; a variant's parameter starts with its owners."""
        text = self.field.description or ""
        return f"{', '.join(self.owners)}: {text}" if self.owners else text


class VariantError(ValueError):
    """A parameter of one variant is given while another is in force; `setting` is its name, `reason` the rest."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting}: {reason}")
        self.setting = setting
        self.reason = reason


def settings_of(model: type[BaseModel]) -> list[Setting]:
    """All settings of a model, those of its nested models and of the registered variants included, in their order.

    Raises ValueError when two parameters have one name, unless variants share a parameter in all respects.
    """
    result: dict[str, Setting] = {}
    for setting in _walk(model, (), "General", ()):
        earlier = result.get(setting.name)
        if earlier is None:
            result[setting.name] = setting
        elif earlier.owners and setting.owners and _identity(earlier) == _identity(setting):
            result[setting.name] = replace(earlier, owners=earlier.owners + setting.owners)
        else:
            raise ValueError(
                f"two parameters never share a name: {setting.name} is {'.'.join(earlier.path)} and "
                f"{'.'.join(setting.path)}; declare another name for one, or the same field for both variants"
            )
    return list(result.values())


def nested(settings: Sequence[Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values, by the names of `settings`, as the nested input of the model that these are of.

    Nested models that get no value are there, empty, so that validation finds what they lack. Raises VariantError.
    """
    in_force = _in_force(settings, values)
    result: dict[str, Any] = {}
    for setting in settings:
        if setting.owners and setting.name not in values:
            continue
        kind, variant = _variant_at(setting.path, in_force)
        if setting.owners and variant and variant not in setting.owners:
            raise VariantError(setting.name, f"the {kind} {variant} has no such parameter; drop it")
        container = result
        for part in setting.path[:-1]:
            container = container.setdefault(part, {})
        if setting.name in values:
            container[setting.path[-1]] = values[setting.name]
    return result


def active(settings: Sequence[Setting], values: Mapping[str, Any]) -> list[Setting]:
    """`settings` without the parameters of variants that are not in force."""
    in_force = _in_force(settings, values)
    return [
        setting
        for setting in settings
        if not setting.owners or _variant_at(setting.path, in_force)[1] in setting.owners
    ]


def flat(instance: BaseModel) -> dict[str, Any]:
    """The value of every setting of a model's instance that is in force, by name."""
    values: dict[str, Any] = {}
    settings = settings_of(type(instance))
    # The names of variants first: they say which of the others there are.
    for setting in [setting for setting in settings if setting.variants]:
        values[setting.name] = _value(instance, setting.path)
    return {setting.name: _value(instance, setting.path) for setting in active(settings, values)}


def _value(instance: Any, path: Sequence[str]) -> Any:
    for part in path:
        instance = getattr(instance, part)
    return instance


def _in_force(settings: Sequence[Setting], values: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[str, str]]:
    """Kind and name of every variant in force, by its path; unknown names are left to validation."""
    result: dict[tuple[str, ...], tuple[str, str]] = {}
    for setting in settings:
        if setting.variants:
            name = values.get(setting.name, setting.variants.default)
            if isinstance(name, str) and name in setting.variants.registry:
                result[setting.path[:-1]] = setting.variants.kind, name
    return result


def _variant_at(path: tuple[str, ...], in_force: Mapping[tuple[str, ...], tuple[str, str]]) -> tuple[str, str]:
    """Kind and name of the variant in force that a parameter's path leads through; empty where none is known."""
    return next((in_force[path[:end]] for end in range(len(path)) if path[:end] in in_force), ("", ""))


def _walk(model: type[BaseModel], path: tuple[str, ...], group: str, owners: tuple[str, ...]) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        setting, here, group_here = extra.get("setting", name), (*path, name), str(extra.get("group", group))
        variants = next((item for item in field.metadata if isinstance(item, Variants)), None)
        annotation = field.annotation
        # False: the field is for programs alone.
        if setting is False:
            continue
        if variants is not None:
            yield from _walk_variants(variants, annotation, here, group_here)
        elif isinstance(annotation, type) and not get_origin(annotation) and issubclass(annotation, BaseModel):
            yield from _walk(annotation, here, group_here, owners)
        else:
            yield Setting(str(setting), here, field, group_here, owners)


def _walk_variants(variants: Variants, base: Any, path: tuple[str, ...], group: str) -> Iterator[Setting]:
    [named] = [setting for setting in _walk(base, path, group, ()) if setting.path == (*path, variants.key)]
    text = "; ".join(f"{name}: {variant.summary}" for name, variant in variants.registry.items())
    names: Any = Literal.__getitem__(tuple(variants.registry))
    field = FieldInfo(annotation=names, default=variants.default, description=f"{named.field.description} {text}.")
    yield replace(named, field=field, variants=variants)
    for name, variant in variants.registry.items():
        for setting in _walk(variant, path, group, (name,)):
            if setting.path != named.path:
                yield setting


def _identity(setting: Setting) -> tuple[Any, ...]:
    field = setting.field
    shape = (field.annotation, field.default, field.default_factory, field.description, field.metadata)
    return setting.path, setting.group, *shape
