"""What a setting's type says of how it is written: one value or several, chosen from a list or free."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def inner(field: FieldInfo) -> Any:
    """The annotation without `| None`."""
    annotation = field.annotation
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def is_many(field: FieldInfo) -> bool:
    """Whether the field takes several values."""
    return get_origin(inner(field)) in (tuple, list)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values that the field can have; empty where it is free."""
    return get_args(inner(field)) if get_origin(inner(field)) is Literal else ()


def default_text(field: FieldInfo) -> str:
    """The default as a person writes it; empty where there is none."""
    value = field.default
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None or value is PydanticUndefined else str(value)
