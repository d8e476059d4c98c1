"""How a setting is called in each place that sets it."""

from __future__ import annotations

ENVIRONMENT_PREFIX = "FEDHDS_"


def flag(name: str) -> str:
    """The flag of a setting: `wire_dtype` is `--wire-dtype`."""
    return "--" + key(name)


def key(name: str) -> str:
    """The key of a setting in the YAML file: `wire_dtype` is `wire-dtype`; underscores work there, too."""
    return name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a setting: `wire_dtype` is `FEDHDS_WIRE_DTYPE`."""
    return ENVIRONMENT_PREFIX + name.upper()
