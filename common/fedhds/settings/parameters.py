"""The base of all frozen models of settings, and how a parameter is declared."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from fedhds.settings.flatten import active, flat, nested, settings_of


def parameter(
    default: Any, description: str, *, setting: str | None = None, group: str | None = None, **constraints: Any
) -> Any:
    """A field of a model of settings; `default` is ... where one must be given.

    `setting` is its flat name where that is not the field's, `group` its group where that is not the model's;
    `constraints` are pydantic's (ge, lt, min_length, ...).
    """
    extra: dict[str, Any] = {key: text for key, text in {"setting": setting, "group": group}.items() if text}
    return Field(default, description=description, json_schema_extra=extra or None, **constraints)


class Parameters(BaseModel):
    """A frozen model whose parameters have flat names, too; numbers are finite, unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Builds it from flat settings: `RunSpec.of(model="m", rounds=3, lora_rank=4)`.

        Raises TypeError for a name that is no setting, ValueError (pydantic.ValidationError, VariantError) for a
        value that is missing or not valid.
        """
        known = settings_of(cls)
        unknown = settings.keys() - {setting.name for setting in known}
        if unknown:
            raise TypeError(f"{cls.__name__} has no setting {min(unknown)!r}")
        return cls.model_validate(nested(known, settings))

    def replace(self, **settings: Any) -> Self:
        """The same with other values of some flat settings; raises as `of` does.

        Where a variant is replaced, parameters that the new one has as well keep their values.
        """
        values = {**flat(self), **settings}
        kept = {setting.name for setting in active(settings_of(type(self)), values)} | settings.keys()
        return self.of(**{name: value for name, value in values.items() if name in kept})
