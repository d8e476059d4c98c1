"""What would keep another program from loading the adapter, told before somebody tries.

vLLM's rules are those of vllm/lora/peft_helper.py, vllm/config/lora.py and vllm/lora/lora_model.py, llama.cpp's those
of src/llama-adapter.cpp. No loader is called: none need be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.export.gguf_adapter import WAY_OUT, check_gguf
from fedhds_client.export.lora import modules_of, tensor_names, variants_of

MERGE = "export it with --format merged and serve that"
# What --max-lora-rank takes; 16 is the default.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
# Without LoRA in vLLM, of what fedhds tunes; what is in neither list is said to be unknown.
_VLLM_WITHOUT = frozenset({"gpt2", "gpt_neo", "gpt_neox", "gptj", "bloom", "mpt", "codegen", "mamba", "mamba2"})
_VLLM_WITH = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "granite", "opt"}
    | {"gpt_bigcode", "smollm3", "olmo2"}
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about an adapter and a loader."""

    blocks: bool
    """Whether the adapter would not load, or compute something else; else it is only to be known."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def _vllm(adapter: AdapterFolder, config: Any) -> list[Finding]:
    if adapter.kind != "LORA":
        kind = adapter.kind or "an unknown kind"
        return [Finding(True, f"vLLM loads LoRA adapters, and this is one of {kind}", MERGE)]
    own, found = adapter.config, []

    def say(problem: str, remedy: str = MERGE, *, blocks: bool = True) -> None:
        found.append(Finding(blocks, problem, remedy))

    for name in variants_of(own):
        say(f"vLLM does not compute {name}")
    if saved := own.get("modules_to_save"):
        say(f"vLLM takes no modules_to_save, and the adapter has {', '.join(saved)}")
    if own.get("trainable_token_indices"):
        say("vLLM takes no trained tokens")
    if own.get("bias", "none") != "none":
        say(f"vLLM takes no biases, and the adapter has those of {own['bias']}")
    if own.get("rank_pattern") or own.get("alpha_pattern"):
        say("vLLM scales all layers alike, and the adapter has ranks or scales of their own for some")
    rank = int(own.get("r", 8))
    if rank > _VLLM_RANKS[-1]:
        say(f"the rank is {rank}, and vLLM takes up to {_VLLM_RANKS[-1]}")
    elif rank > _VLLM_DEFAULT_RANK:
        needed = next(size for size in _VLLM_RANKS if size >= rank)
        say(
            f"the rank is {rank}, and vLLM takes {_VLLM_DEFAULT_RANK} by default",
            f"start it with --max-lora-rank {needed}",
            blocks=False,
        )
    modules, others = modules_of(tensor_names(adapter))
    if any("embed" in name for name in (*modules, *others)) or "lm_head" in modules:
        say("vLLM adapts linear layers, and the adapter has an embedding or the output layer, too")
    elif others and not found:
        say(f"vLLM takes factors of linear layers alone, and the adapter has {others[0]}")
    if config.model_type in _VLLM_WITHOUT:
        say(f"vLLM has no LoRA for {config.model_type} models")
    elif config.model_type not in _VLLM_WITH:
        say(
            f"whether vLLM has LoRA for {config.model_type} models is not known here",
            "look for a mark under LoRA in vLLM's list of supported models",
            blocks=False,
        )
    return found


def _llama_cpp(adapter: AdapterFolder, config: Any) -> list[Finding]:
    found = [Finding(True, problem, WAY_OUT) for problem in check_gguf(adapter, config)]
    if adapter.config.get("use_rslora") and not found:
        remedy = "export it with --format gguf, which puts the scale into the factors"
        found.append(Finding(False, "llama.cpp's own converter ignores rsLoRA's scale", remedy))
    return found


def _ollama(adapter: AdapterFolder, config: Any) -> list[Finding]:
    # Ollama loads adapters with llama.cpp's code, and a merged model of the architectures that it converts.
    return [
        Finding(item.blocks, item.problem, item.remedy.replace("--format gguf", "--format ollama"))
        for item in _llama_cpp(adapter, config)
    ]


LOADERS: dict[str, Callable[[AdapterFolder, Any], list[Finding]]] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "ollama": _ollama,
}
"""By the loader's name: what it would stumble over, given the adapter and the base model's configuration."""
