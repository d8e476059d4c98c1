"""An open choice between models: the name in one of their fields says which class the others belong to.

Pydantic's own discriminated unions are closed when the class is built. These read a registry each time a value is
validated, so that a plug-in or a test adds a class to the registry and can use it from a flag, YAML and JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Variants:
    """Metadata of a field, `Annotated[Base, Variants(...)]`, that takes instances of the registered classes.

    The classes are subclasses of Base, which declares the field `key`; each has a `summary` for the documentation.
    """

    def __init__(self, registry: Mapping[str, type[Any]], *, key: str, default: str, kind: str) -> None:
        self.registry = registry
        self.key = key
        """The field with the name."""
        self.default = default
        """The name that is meant where none is given."""
        self.kind = kind
        """What the classes are, for messages: "selection strategy"."""

    def make_default(self) -> Any:
        """An instance of the default class with its defaults."""
        return self.registry[self.default]()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Without a serializer of its own the value is written as what it is, with the fields of its class.
        return core_schema.no_info_plain_validator_function(self._validate)

    def _validate(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self._class(value.get(self.key, self.default)).model_validate(value)
        if isinstance(value, BaseModel) and type(value) is self._class(getattr(value, self.key, None)):
            return value
        raise ValueError(f"{value!r} is not a {self.kind}")

    def _class(self, name: object) -> type[Any]:
        if not isinstance(name, str) or name not in self.registry:
            raise ValueError(f"{name!r} is not a known {self.kind}; choose one of {', '.join(self.registry)}")
        return self.registry[name]
