"""What other programs would not load is said beforehand, each with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import IA3Config

from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.export.loaders import LOADERS, Finding


def findings(loader: str, made: Callable[..., Any], architecture: str = "llama", **words: Any) -> list[Finding]:
    base, _, folder = made(architecture, **words)
    return LOADERS[loader](AdapterFolder.open(folder), base.config)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_plain_adapter_on_llama_has_no_findings(loader: str, made: Callable[..., Any]) -> None:
    assert findings(loader, made) == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save, and the adapter has lm_head"),
        ({"bias": "lora_only"}, "biases"),
        ({"rank_pattern": {"q_proj": 2}}, "scales all layers alike"),
        ({"r": 600}, "the rank is 600, and vLLM takes up to 512"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "an embedding or the output layer"),
        ({"config": IA3Config(task_type="CAUSAL_LM")}, "one of IA3"),
        ({"architecture": "gpt_neox"}, "no LoRA for gpt_neox"),
    ],
)
def test_what_vllm_would_not_load(words: dict[str, Any], problem: str, made: Callable[..., Any]) -> None:
    blocking = [finding for finding in findings("vllm", made, **words) if finding.blocks]
    assert any(problem in str(finding) for finding in blocking), blocking
    assert all("--format merged" in finding.remedy for finding in blocking)


def test_ranks_that_vllm_takes_with_a_flag_are_a_note(made: Callable[..., Any]) -> None:
    (finding,) = findings("vllm", made, r=100)
    assert not finding.blocks
    assert "--max-lora-rank 128" in finding.remedy


def test_an_architecture_of_which_nothing_is_known_is_a_note(made: Callable[..., Any]) -> None:
    (finding,) = findings("vllm", made, "stablelm")
    assert not finding.blocks
    assert "not known here" in finding.problem


@pytest.mark.parametrize(
    ("words", "problem", "blocks"),
    [
        ({"use_dora": True}, "DoRA", True),
        ({"modules_to_save": ["lm_head"]}, "factors of linear layers alone", True),
        ({"use_rslora": True}, "ignores rsLoRA's scale", False),
        ({"architecture": "gpt_neox"}, "gpt_neox", True),
    ],
)
def test_what_llama_cpp_would_not_load(
    words: dict[str, Any], problem: str, blocks: bool, made: Callable[..., Any]
) -> None:
    found = findings("llama.cpp", made, **words)
    assert any(problem in finding.problem and finding.blocks is blocks for finding in found), found
