"""What the first site may write into everybody's adapter_config.json."""

from __future__ import annotations

from typing import Any

import pytest

from fedhds.errors import AdapterError
from fedhds.spec import RunSpec
from fedhds_server.rpc.adapter_config import check_adapter_config

SPEC = RunSpec.of(model="m", rounds=1, lora_rank=2)


# As PEFT 0.21 writes it.
WRITTEN: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": "m",
    "revision": None,
    "inference_mode": True,
    "r": 2,
    "target_modules": ["mlp.up", "q_proj"],
    "exclude_modules": None,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_pattern": None,
    "rank_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "loftq_config": {},
    "use_dora": False,
    "qalora_group_size": 16,
}


def test_what_peft_writes_for_the_run_passes() -> None:
    check_adapter_config(WRITTEN, SPEC)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # PEFT imports these.
        ("auto_mapping", {"base_model_class": "system", "parent_library": "os"}),
        ("megatron_core", "evil"),
        ("megatron_config", {"x": 1}),
        # It loads what a path names.
        ("init_lora_weights", "/etc/passwd"),
        ("base_model_name_or_path", "somebody/else"),
        ("revision", "theirs"),
        ("arrow_config", {"task_adapters": ["http://example.org"]}),
        # It is another adapter than the run's.
        ("peft_type", "IA3"),
        ("r", 64),
        ("lora_alpha", 1e9),
        ("rank_pattern", {"q_proj": 99}),
        ("target_modules", ["q_proj", "<script>"]),
        ("target_modules", "(a+)+$"),
        ("modules_to_save", "lm_head"),
        ("peft_version", "<b>1</b>"),
        ("qalora_group_size", float("inf")),
        ("a key\n", None),
        ("note", "[click](http://example.org)"),
    ],
)
def test_what_the_run_does_not_ask_for_is_refused(key: str, value: object) -> None:
    with pytest.raises(AdapterError):
        check_adapter_config(WRITTEN | {key: value}, SPEC)
