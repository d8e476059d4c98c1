"""adapter_config.json comes from the first site that registers, and other people's PEFT reads it: what it may say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fedhds.errors import AdapterError
from fedhds.spec import RunSpec

_KEY = re.compile("[a-z][a-z0-9_]{0,63}")
# PEFT's enumerations, such as RANDOM. Names of modules to import, of files and of models are not written so.
_CONSTANT = re.compile("[A-Z][A-Z0-9_]{0,63}")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,199}")
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,40}")
_MAX_MODULES = 10_000
# As PEFT writes them where nothing is set.
_DEFAULTS = {"bias": "none", "megatron_core": "megatron.core"}


def check_adapter_config(config: Mapping[str, Any], spec: RunSpec) -> None:
    """Checks that the file says of the run what the specification says, and else nothing that PEFT acts on.

    What is set by the run has the run's value. All other values are switches, numbers, PEFT's own constants, empty, or
    names of the model's modules: PEFT imports a module that `auto_mapping` or `megatron_core` names, and loads what a
    path names. Raises AdapterError, naming the key.
    """
    stated = {
        "base_model_name_or_path": spec.model.name,
        "revision": spec.model.revision or None,
        "peft_type": spec.peft.peft_type,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        **spec.peft.stated,
    }
    for key, value in config.items():
        if not _KEY.fullmatch(key):
            raise AdapterError(f"the adapter's configuration has the key {key[:64]!r}, which PEFT does not write")
        if key in stated:
            if value != stated[key]:
                raise AdapterError(
                    f"the adapter's configuration has another {key} than the run's {stated[key]!r}; install the "
                    "coordinator's version of fedhds"
                )
        elif not _harmless(key, value):
            raise AdapterError(f"the adapter's configuration sets {key} to what the run does not ask for")


def _harmless(key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool) or value in ({}, []):
        return True
    if isinstance(value, int | float):
        return math.isfinite(value)
    if isinstance(value, str):
        version = key == "peft_version" and _VERSION.fullmatch(value)
        return bool(version or _CONSTANT.fullmatch(value) or value == _DEFAULTS.get(key))
    if isinstance(value, list) and key.endswith("_modules"):
        return len(value) <= _MAX_MODULES and all(isinstance(name, str) and _MODULE.fullmatch(name) for name in value)
    return False
