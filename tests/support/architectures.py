"""Tiny models with random weights of all architectures that transformers loads as causal language models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 259

# Sizes by the names that configurations give them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim"), 32),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "max_seq_len"), 256),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("n_inner", "dff", "dim_ff", "d_inner", "feed_forward_size", "mamba_d_ssm"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "swa_head_dim", "attention_head_size", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "rotary_dim"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size"), VOCABULARY),
    "hidden_size_per_layer_input": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Those of encoders that can be decoders, and of the decoders of encoder-decoders.
    "is_decoder": True,
    "is_encoder_decoder": False,
}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_TEXT = {
    name: _SIZES[name]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
} | {"head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What the sizes alone do not say.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        **{f"{part}_config": {"hidden_size_global": 32} for part in ("encoder", "decoder")},
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "layer_types": None, "num_hidden_layers": 2},
        "vision_config": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "layer_types": None, "num_hidden_layers": 2},
    "fuyu": {"text_config": {"model_type": "persimmon", **_TEXT}, "patch_size": 2, "image_token_id": 3},
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **_VISION},
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4},
    "gemma4_unified": {
        "vision_config": {"patch_size": 2, "mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 16}
    },
    "gemma4_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {"model_type": "gemma4_text", **_TEXT, **_TYPES, "hidden_size_per_layer_input": 0}
        | {"vocab_size_per_layer_input": 0},
    },
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {"model_type": "gemma4_unified_text", **_TEXT, **_TYPES},
    },
    "got_ocr2": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {"image_size": 64, "mlp_dim": 64, "output_channels": 16},
        "image_token_index": 3,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    "mamba2": {"head_dim": 16},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3", **_TEXT}, "audio_token_id": 3},
    "moshi": {"audio_encoder_config": {"model_type": "mimi"}, "num_codebooks": 2},
    "phi4_multimodal": {"audio_config": {"num_blocks": 1, "nemo_conv_channels": 16, "ext_pw_out_channel": 32}},
    "prophetnet": {
        **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
        **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    },
    "qwen4_exp": {"text_config": {**_QSA, "indexer_compress_ratio": 4}},
    "qwen4_exp_text": {**_QSA, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "roc_bert": {
        **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
        **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 16),
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def tiny_config(architecture: str) -> Any:
    """A small configuration of a `model_type`, with a layer of each of its kinds."""
    kind = CONFIG_MAPPING[architecture]
    arguments = _sizes(kind)
    for name, value in _OVERRIDES.get(architecture, {}).items():
        own = arguments.get(name)
        arguments[name] = own | value if isinstance(own, dict) and isinstance(value, dict) else value
    return kind(**arguments)


def tiny_model(config: Any) -> Any:
    """A model of random weights in which nothing is 0 or 1 as a start: what is there counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def _sizes(kind: Any) -> dict[str, Any]:
    """The sizes that a configuration's class has, also those of its parts."""
    fields = {field.name for field in dataclasses.fields(kind)}
    names = getattr(kind, "attribute_map", {})
    sizes = {
        name: value
        for name, value in _SIZES.items()
        if name in fields or (names.get(name) in fields and names[name] not in _SIZES)
    }
    if "qk_rope_head_dim" in sizes and "num_key_value_heads" in sizes:
        # Keys and values come from one latent vector, for each head.
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    types: str = "layer_types" if "layer_types" in fields else names.get("layer_types", "")
    distinct = list(dict.fromkeys(_default(kind, types) or ())) if types in fields else []
    if len(distinct) > 1:
        sizes |= {types: distinct} | {name: len(distinct) for name in _LAYERS if name in sizes}
    for name, part in kind.sub_configs.items():
        if part is not AutoConfig:
            sizes[name] = _sizes(part)
    return sizes


def _default(kind: Any, name: str) -> Any:
    try:
        return getattr(kind(), name)
    except (AttributeError, ValueError):
        return None
