"""Typed settings: nested pydantic models that people fill by flat flags, FEDHDS_* variables and a YAML file."""

from fedhds.settings.addresses import addresses, check_http, host_and_port, is_loopback
from fedhds.settings.flatten import Setting, VariantError, flat, settings_of
from fedhds.settings.loader import load
from fedhds.settings.main import run_main
from fedhds.settings.names import flag, variable
from fedhds.settings.parameters import Parameters, parameter
from fedhds.settings.reference import reference
from fedhds.settings.variants import Variants

__all__ = [
    "Parameters",
    "Setting",
    "VariantError",
    "Variants",
    "addresses",
    "check_http",
    "flag",
    "flat",
    "host_and_port",
    "is_loopback",
    "load",
    "parameter",
    "reference",
    "run_main",
    "settings_of",
    "variable",
]
