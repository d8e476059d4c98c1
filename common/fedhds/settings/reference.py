"""The settings as tables, for the configuration reference."""

from __future__ import annotations

from pydantic import BaseModel

from fedhds.settings.flatten import settings_of
from fedhds.settings.kinds import choices, default_text
from fedhds.settings.names import flag, variable


def reference(model: type[BaseModel]) -> str:
    """The settings as a Markdown table per group, for the configuration reference."""
    groups: dict[str, list[str]] = {}
    for setting in settings_of(model):
        field, text = setting.field, setting.description
        value = default_text(field)
        default = "required" if field.is_required() else f"`{value}`" if value else ""
        # The names of variants stand in the description already, each with what it does.
        if choices(field) and not setting.variants:
            text += f" One of {', '.join(choices(field))}."
        row = f"| `{flag(setting.name)}` | `{variable(setting.name)}` | {default} | {text} |"
        groups.setdefault(setting.group, []).append(row)
    head = "| flag | environment | default | effect |\n| --- | --- | --- | --- |\n"
    return "\n\n".join(f"### {group}\n\n{head}" + "\n".join(rows) for group, rows in groups.items()) + "\n"
