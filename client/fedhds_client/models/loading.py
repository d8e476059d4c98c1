"""The base model of a site, loaded by path or hub id, with its tokenizer."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.hub import cached_file

from fedhds.errors import ModelError
from fedhds_client.models.fingerprint import weights_digest
from fedhds_client.models.packages import missing_package
from fedhds_client.models.precision import four_bit, weight_dtype
from fedhds_client.models.probing import check_causal, takes_left_padding

logger = logging.getLogger(__name__)

_MAX_CONFIG_BYTES = 4 << 20
# Some ten times those of the largest models known.
_MAX_AMOUNTS = {
    "num_hidden_layers": 2_000,
    "hidden_size": 1 << 19,
    "intermediate_size": 1 << 21,
    "vocab_size": 1 << 23,
    "num_attention_heads": 1 << 13,
    "num_experts": 1 << 13,
    "num_local_experts": 1 << 13,
    "n_routed_experts": 1 << 13,
}

# In the order in which transformers looks for them.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Where configurations say how many positions there are.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
_UNLIMITED = 2**31 - 1


@dataclass
class BaseModel:
    """A loaded model, a causal LM but for a model of features.

    `max_length` is its longest row in tokens, `weight_files` are what it was loaded from.
    """

    name: str
    model: Any
    tokenizer: Any
    max_length: int
    stored_dtype: torch.dtype
    weight_files: tuple[Path, ...]
    cache_dir: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.model.device)

    @cached_property
    def left_padding(self) -> bool:
        """Whether it answers padded prompts as it answers them alone; tried when first asked for. Raises TaskError."""
        return takes_left_padding(self)

    @cached_property
    def weights(self) -> str:
        """SHA-256 over all tensors as stored, in whatever layout of files; taken when first asked for."""
        return weights_digest(self.name, self.weight_files, self.cache_dir)


def load_base_model(
    name: str,
    *,
    revision: str = "",
    device: str = "auto",
    dtype: str = "auto",
    cache_dir: Path | None = None,
    body_only: bool = False,
) -> BaseModel:
    """Loads a causal LM and its tokenizer; a local path makes no network call and takes no revision.

    With `body_only` it may be an encoder, too, also one under a classifier, and comes without a head: enough to take
    features. Rows are padded with the tokenizer's padding token; one that the model has no embedding for is replaced.

    `device` is auto (a GPU when there is one), cpu or cuda. `dtype` is a floating type's name, 4bit (on a GPU), or
    auto: bfloat16 where the hardware multiplies it fast and the model is not small, else float32. `cache_dir`
    remembers digests of weight files by path, size and time. Code that comes with a model is never run. Raises
    ModelError.
    """
    source, options = _source(name, revision)
    where = _device(device)
    config = _config(name, source, options, body_only)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    tokenizer = _tokenizer(name, source, options, body_only)
    options |= {"config": config, "dtype": weight_dtype("bfloat16" if dtype == "4bit" else dtype, where, config)}
    if dtype == "4bit":
        options["quantization_config"] = four_bit(name, where, config)
    model = _model(name, source, options, where, body_only)
    _check_padding(name, tokenizer, model)
    longest = min(_max_length(config, tokenizer), _table_length(model))
    base = BaseModel(name, model.eval(), tokenizer, longest, stored, tuple(_weight_files(source, options)), cache_dir)
    if not body_only:
        check_causal(base)
    return base


def load_config(name: str, *, revision: str = "") -> Any:
    """The configuration of a causal LM's text model, without its weights; raises ModelError."""
    source, options = _source(name, revision)
    return _config(name, source, options, False).get_text_config(decoder=True)


def load_tokenizer(name: str, *, revision: str = "") -> tuple[Any, int]:
    """The tokenizer of a causal LM and the model's longest row in tokens, without its weights; raises ModelError."""
    source, options = _source(name, revision)
    config = _config(name, source, options, False)
    tokenizer = _tokenizer(name, source, options, False)
    return tokenizer, _max_length(config, tokenizer)


def local_folder(name: str) -> str:
    """The folder of this machine with a model's weights, absolute; the name itself where there is none."""
    source, options = _source(name, "")
    files = _weight_files(source, options)
    return str(files[0].parent.absolute()) if files else name


def _source(name: str, revision: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to load from, and how."""
    _quieten()
    local = Path(os.path.expanduser(name))
    if not local.is_dir() and (name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise ModelError(f"there is no model folder {name}; give a folder with a model or a hub id like org/name")
    # Explicit, or transformers would ask at the terminal.
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision and not local.is_dir():
        options["revision"] = revision
    return str(local) if local.is_dir() else name, options


def _max_length(config: Any, tokenizer: Any) -> int:
    """The longest row in tokens that configuration and tokenizer name."""
    configs = config, config.get_text_config(decoder=True)
    limits = [getattr(part, name, None) for part in configs for name in _LENGTHS]
    usable = [limit for limit in (*limits, tokenizer.model_max_length) if isinstance(limit, int) and 0 < limit < 10**9]
    return min(usable, default=_UNLIMITED)


def _table_length(model: Any) -> int:
    """The positions that the model's table has for tokens: RoBERTa's kind counts from behind the one for padding."""
    limits = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min(limits, default=_UNLIMITED)


def _quieten() -> None:
    """transformers and the hub's client neither chat on stderr nor start conversions of other people's models."""
    talkers: tuple[Any, Any] = transformers.utils.logging, huggingface_hub.utils.logging
    for talker in talkers:
        talker.set_verbosity_error()
        # Errors go where all else is logged, in its form; each has a handler of its own that writes to stderr.
        library = logging.getLogger(talker.__name__.partition(".")[0])
        library.handlers.clear()
        library.propagate = True
    talkers[0].disable_progress_bar()
    disable_progress_bars()
    # A hub model without safetensors would make transformers ask the hub for a conversion, in a thread.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no CUDA device here; use --device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _config(name: str, source: str, options: dict[str, Any], body_only: bool) -> Any:
    folder = Path(source)
    # transformers would load an adapter folder's base model, from wherever the folder says.
    if folder.is_dir() and (folder / "adapter_config.json").exists():
        raise ModelError(f"{name} is an adapter; give the base model that it was trained on")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(f"the folder {name} holds no model: it has no config.json")
    if folder.is_dir() and (folder / "config.json").stat().st_size > _MAX_CONFIG_BYTES:
        raise ModelError(
            f"the model {name} has an unusable config.json: it is larger than {_MAX_CONFIG_BYTES >> 20} MiB"
        )
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        # Each kind of configuration checks its values in its own way.
        _refuse_own_code_or_missing_package(name, error)
        unknown = re.search(r"has model type `(.+?)` but Transformers does not recognize", str(error))
        if unknown:
            raise ModelError(
                f"{name} is a {unknown[1]} model, which transformers {transformers.__version__} does not know; install "
                "a newer one or choose another model"
            ) from error
        if folder.is_dir():
            raise ModelError(f"the model {name} has an unusable config.json: {first_line(error)}") from error
        raise ModelError(
            f"there is no folder {name}, and no model of that name can be had from the hub ({first_line(error)}); "
            "check the name, the network and, for a gated model, HF_TOKEN, or give a local folder"
        ) from error
    _check_amounts(name, config)
    if body_only:
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder; take features with an encoder or a causal language model")
        return config
    masked = any(kind.endswith("ForMaskedLM") for kind in config.architectures or ())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or masked:
        raise ModelError(f"{name} is a {config.model_type} model, not a causal language model; choose one that is")
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}); choose a causal language model")
    return config


def _check_amounts(name: str, config: Any) -> None:
    """Raises ModelError for a configuration whose model nobody has: building it would take hours or all memory."""
    text = config.get_text_config()
    for field, largest in _MAX_AMOUNTS.items():
        amount = getattr(text, field, None)
        if isinstance(amount, int) and not 0 <= amount <= largest:
            raise ModelError(
                f"the model {name} has an unusable config.json: {field} is {amount}, no model has over {largest}"
            )


def _tokenizer(name: str, source: str, options: dict[str, Any], body_only: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        # The Rust library behind it raises plain Exception for a damaged tokenizer.json.
        _refuse_own_code_or_missing_package(name, error)
        raise ModelError(f"{name} has no usable tokenizer ({first_line(error)}); put its files there") from error
    if not len(tokenizer) or (tokenizer.eos_token_id is None and not body_only):
        raise ModelError(f"the tokenizer of {name} has no vocabulary or no end-of-text token; it cannot end an answer")
    return tokenizer


def _refuse_own_code_or_missing_package(name: str, error: Exception) -> None:
    """Raises ModelError where that is what a library's error says."""
    if "trust_remote_code" in str(error):
        raise ModelError(f"{name} comes with code of its own, which is never run; use another model") from error
    package = missing_package(error)
    if package:
        raise ModelError(f"{name} needs the Python package {package}; install it where this runs") from error


def _check_padding(name: str, tokenizer: Any, model: Any) -> None:
    """Makes the tokenizer pad with a token that the model has; padding is masked, so any will do."""
    size = model.get_input_embeddings().weight.shape[0]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is not None and eos >= size:
        raise ModelError(f"the end-of-text token of {name} has the id {eos}, but the model has only {size} embeddings")
    if pad is None or pad >= size:
        fault = "no padding token" if pad is None else f"the padding token {pad}, and the model has {size} embeddings"
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0) if eos is None else tokenizer.eos_token
        logger.info("the tokenizer of %s has %s; it pads with %s", name, fault, tokenizer.pad_token)


def _model(name: str, source: str, options: dict[str, Any], where: torch.device, body_only: bool) -> Any:
    damaged = f"the weight files of {name} are missing or damaged"
    auto: Any = AutoModel if body_only else AutoModelForCausalLM
    quantized = "quantization_config" in options or getattr(options["config"], "quantization_config", None) is not None
    if quantized:
        # Its layers cannot be moved later.
        options = options | {"device_map": {"": where}}
    try:
        model, report = auto.from_pretrained(source, output_loading_info=True, **options)
        # transformers fills gaps with random values.
        # A pooler sits on top of the hidden states and is not used; many checkpoints of encoders lack it.
        missing = sorted(key for key in report["missing_keys"] if not (body_only and "pooler" in key))
        if missing:
            raise ModelError(f"{damaged}: they hold no {missing[0]} ({len(missing)} lacking); download it again")
        if not quantized:
            return model.to(where)
        for module in model.modules():
            # On some CPUs bitsandbytes repacks weights at the first inference, and then they give no gradients.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model
    except ModelError:
        raise
    except Exception as error:
        # transformers, the code of its models and that of quantizers raise what they like.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            advice = "use --device cpu" if where.type == "cuda" else "use a smaller one"
            raise ModelError(f"the model {name} does not fit into memory on {where}; free some or {advice}") from error
        _refuse_own_code_or_missing_package(name, error)
        if quantized:
            raise ModelError(
                f"{name} is quantized and cannot be loaded here: {first_line(error)}; use the model that it was made of"
            ) from error
        if isinstance(error, OSError | RuntimeError | ValueError | KeyError | SafetensorError):
            reason = "shapes differ from config.json" if "mismatched" in str(error) else first_line(error)
            raise ModelError(f"{damaged}: {reason}; download it again") from error
        kind = options["config"].model_type
        raise ModelError(
            f"transformers {transformers.__version__} cannot make a model of {name}, which is of the type {kind}: "
            f"{first_line(error)}; choose another"
        ) from error


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(" .") if lines else type(error).__name__


def _weight_files(source: str, options: dict[str, Any]) -> list[Path]:
    """The files that a model just loaded was read from; for a hub model, in the hub's cache."""
    where = {key: value for key, value in options.items() if key == "revision"}

    def cached(name: str) -> Path | None:
        path = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False, **where)
        return Path(path) if path else None

    names = (stem + ending for stem in _WEIGHT_FILES for ending in ("", ".index.json"))
    first = next((path for name in names if (path := cached(name))), None)
    if first is None or first.suffix != ".json":
        return [first] if first else []
    parts = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for name in parts if (path := cached(name))]
