"""The base model of a site: loaded by path or hub id, fingerprinted, and wrapped in the run's LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from fedhds.adapter import AdapterManifest, AdapterReader, Artifact, FloatArray, TensorSpec, write_adapter
from fedhds.errors import AdapterError, ModelError
from fedhds.runspec import RunSpec, WireDtype
from fedhds.v1 import federation_pb2 as pb

logger = logging.getLogger(__name__)

# Of the configuration, what depends on where, by which version or for which class it was written, not on what the
# model computes: `architectures` is one of these, for the class comes from model_type.
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
# In the order in which transformers looks for them.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


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
    def weights(self) -> str:
        """SHA-256 over all tensors as stored, whatever the files' layout; taken when first asked for."""
        return _weights_digest(self.name, self.weight_files, self.cache_dir)


@dataclass
class InferenceModel:
    """A module to measure: the base model itself, or the base model with an adapter on it."""

    base: BaseModel
    module: Any

    @property
    def tokenizer(self) -> Any:
        """The base model's."""
        return self.base.tokenizer

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.base.device

    @classmethod
    def with_adapter(cls, base: BaseModel, folder: Path) -> InferenceModel:
        """The base model with a PEFT folder's LoRA adapter; raises ModelError when the two do not fit."""
        # Read here and not by PEFT, which only warns of missing tensors and asks the hub for missing files.
        try:
            config = LoraConfig.from_pretrained(str(folder))
            if not isinstance(config, LoraConfig):
                raise ValueError("another kind of adapter")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{folder / 'adapter_config.json'} does not describe a LoRA adapter") from error
        module = _with_lora(base, config)
        try:
            _set_adapter(module, _manifest(module, ()), folder / "adapter_model.safetensors")
        except (AdapterError, OSError) as error:
            raise ModelError(f"the adapter {folder} does not fit the base model {base.name}: {error}") from error
        return cls(base, module)


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

    With `body_only` it may be an encoder, too, and comes without a head: enough to take features.

    `device` is auto (a GPU when there is one), cpu or cuda. `dtype` is a floating type's name, or auto: bfloat16
    on a GPU that has it, else float32 (half precision is slow and coarse on a CPU). `cache_dir` remembers digests of
    weight files by path, size and time. Code that comes with a model is never run. Raises ModelError.
    """
    _quieten()
    local = Path(name).expanduser()
    if not local.is_dir() and (name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise ModelError(f"there is no model folder {name}; give a folder with a model or a hub id like org/name")
    source = str(local) if local.is_dir() else name
    # Said aloud, or transformers would ask at the terminal.
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision and not local.is_dir():
        options["revision"] = revision
    where = _device(device)
    config = _config(name, source, options, body_only)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    tokenizer = _tokenizer(name, source, options, body_only)
    model = _model(name, source, options | {"config": config, "dtype": _dtype(dtype, where)}, where, body_only)
    limits = (getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None))
    known = [limit for limit in (*limits, tokenizer.model_max_length) if isinstance(limit, int) and 0 < limit < 10**9]
    files = tuple(_weight_files(source, options))
    return BaseModel(name, model.eval(), tokenizer, min(known, default=2**31 - 1), stored, files, cache_dir)


def fingerprint(base: BaseModel, template: str) -> pb.ModelFingerprint:
    """What must be equal at every site, as SHA-256; `template` is the digest of the prompt template in effect."""
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else base.tokenizer.get_vocab()
    if backend is not None:
        # Set by whoever last encoded a batch.
        vocabulary |= {"truncation": None, "padding": None}
    special = {name: str(token) for name, token in base.tokenizer.special_tokens_map.items()}
    return pb.ModelFingerprint(
        weights=base.weights,
        config=_digest(_lasting(base.model.config.to_diff_dict())),
        tokenizer=_digest({"vocabulary": vocabulary, "special": special}),
        template=template,
    )


class AdapterModel(InferenceModel):
    """The base model with one LoRA adapter in float32, put into `base.model` itself; the base weights are frozen."""

    def __init__(self, base: BaseModel, spec: RunSpec) -> None:
        """A new adapter as the run wants it: B = 0, so that it changes nothing. Raises ModelError for bad targets."""
        self._spec = spec
        head = base.model.get_output_embeddings()
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in base.model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        }
        targets = sorted(linear) if spec.lora_targets == ("all-linear",) else sorted(set(spec.lora_targets))
        unknown = [target for target in targets if target not in linear]
        if unknown:
            raise ModelError(f"the model has no linear module {unknown[0]!r}; it has {', '.join(sorted(linear))}")
        config = LoraConfig(
            r=spec.lora_rank,
            lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # PEFT scales by any number
            lora_dropout=spec.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            bias="none",
        )
        super().__init__(base, _with_lora(base, config))
        self._manifest = _manifest(self.module, tuple(targets))

    def manifest(self) -> AdapterManifest:
        """Names and shapes as PEFT saves them, sorted by name."""
        return self._manifest

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's tensors."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def load(self, path: Path) -> None:
        """Sets the adapter from a safetensors file; raises AdapterError when it does not fit."""
        _set_adapter(self.module, self._manifest, path)

    @property
    def wire_dtype(self) -> WireDtype:
        """The run's wire type."""
        return self._spec.wire_dtype

    def values(self) -> Callable[[TensorSpec], FloatArray]:
        """The adapter's tensors, on the CPU."""
        state = _adapter_state(self.module)
        return lambda spec: state[spec.name].detach().cpu().numpy()

    def save(self, path: Path) -> Artifact:
        """Writes the adapter in the run's type of global adapters."""
        return write_adapter(path, self._manifest, self.values(), self._spec.adapter_dtype)


def _with_lora(base: BaseModel, config: LoraConfig) -> Any:
    """PEFT's wrapper around the base model, with the adapter in float32 and dropout off."""
    # PEFT warns when it replaces another name.
    config.base_model_name_or_path = None
    try:
        with warnings.catch_warnings():
            # GPT-2's Conv1D keeps its weights transposed. PEFT sees that at every module, whatever the configuration
            # says (so a checkpoint's may say False), and warns.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT 0.21 asks transformers 5 for a name that it is about to rename.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            module: Any = get_peft_model(base.model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"the adapter does not fit the base model {base.name}: {_first_line(error)}") from error
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return module.eval()


def _adapter_state(module: Any) -> dict[str, torch.Tensor]:
    # The parameters themselves, under the names that PEFT saves them by: writing to them sets the adapter.
    return dict(get_peft_model_state_dict(module, save_embedding_layers=False))


def _manifest(module: Any, targets: tuple[str, ...]) -> AdapterManifest:
    shapes = {name: tuple(tensor.shape) for name, tensor in _adapter_state(module).items()}
    return AdapterManifest(tuple(TensorSpec(name, shapes[name]) for name in sorted(shapes)), targets)


def _set_adapter(module: Any, manifest: AdapterManifest, path: Path) -> None:
    state = _adapter_state(module)
    with AdapterReader(path, manifest) as reader, torch.no_grad():
        for spec in manifest.tensors:
            state[spec.name].copy_(torch.from_numpy(reader.tensor(spec)))


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


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no CUDA device here; use --device auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(wanted: str, where: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if where.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    found = getattr(torch, wanted, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{wanted!r} is not a floating type; use auto, float32, bfloat16 or float16")
    return found


def _config(name: str, source: str, options: dict[str, Any], body_only: bool) -> Any:
    folder = Path(source)
    # transformers would load an adapter folder's base model, from wherever the folder says.
    if folder.is_dir() and (folder / "adapter_config.json").exists():
        raise ModelError(f"{name} is an adapter; give the base model that it was trained on")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(f"the folder {name} holds no model: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(f"{name} comes with code of its own, which is never run; use another model") from error
        if folder.is_dir():
            raise ModelError(f"the model {name} has an unusable config.json: {_first_line(error)}") from error
        raise ModelError(
            f"there is no folder {name}, and no model of that name can be had from the hub ({_first_line(error)}); "
            "check the name, the network and, for a gated model, HF_TOKEN, or give a local folder"
        ) from error
    if body_only:
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder; take features with an encoder or a causal language model")
        return config
    masked = any(kind.endswith("ForMaskedLM") for kind in config.architectures or ())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or masked:
        raise ModelError(f"{name} is a {config.model_type} model, not a causal language model; choose one that is")
    return config


def _tokenizer(name: str, source: str, options: dict[str, Any], body_only: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        # The Rust library behind it raises plain Exception for a damaged tokenizer.json.
        raise ModelError(f"{name} has no usable tokenizer ({_first_line(error)}); put its files there") from error
    if not len(tokenizer) or (tokenizer.eos_token_id is None and not body_only):
        raise ModelError(f"the tokenizer of {name} has no vocabulary or no end-of-text token; it cannot end an answer")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer of %s has no padding token; it pads with %s", name, tokenizer.eos_token)
    return tokenizer


def _model(name: str, source: str, options: dict[str, Any], where: torch.device, body_only: bool) -> Any:
    damaged = f"the weight files of {name} are missing or damaged"
    auto: Any = AutoModel if body_only else AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(source, output_loading_info=True, **options)
        # transformers fills gaps with random values.
        # A pooler sits on top of the hidden states and is not used; many checkpoints of encoders lack it.
        missing = sorted(key for key in report["missing_keys"] if not (body_only and "pooler" in key))
        if missing:
            raise ModelError(f"{damaged}: they hold no {missing[0]} ({len(missing)} lacking); get the model anew")
        return model.to(where)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            advice = "use --device cpu" if where.type == "cuda" else "use a smaller one"
            raise ModelError(f"the model {name} does not fit into memory on {where}; free some or {advice}") from error
        reason = "shapes differ from config.json" if "mismatched" in str(error) else _first_line(error)
        raise ModelError(f"{damaged}: {reason}; get the model anew") from error
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        # ImportError: a quantised model without the package that reads it; the text names the package.
        raise ModelError(f"{damaged}: {_first_line(error)}; get the model anew") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(" .") if lines else type(error).__name__


def _weight_files(source: str, options: dict[str, Any]) -> list[Path]:
    """The files that a model just loaded was read from; for a hub model, in the hub's cache."""
    where = {key: value for key, value in options.items() if key == "revision"}

    def found(name: str) -> Path | None:
        path = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False, **where)
        return Path(path) if path else None

    names = (stem + ending for stem in _WEIGHT_FILES for ending in ("", ".index.json"))
    first = next((path for name in names if (path := found(name))), None)
    if first is None or first.suffix != ".json":
        return [first] if first else []
    parts = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for name in parts if (path := found(name))]


def _weights_digest(name: str, files: tuple[Path, ...], cache_dir: Path | None) -> str:
    if not files:
        raise ModelError(f"the weight files of {name} cannot be found again; load the model from a local folder")
    try:
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        remembered = cache_dir / "weights" / _digest(stats) if cache_dir else None
        if remembered and remembered.exists():
            return remembered.read_text(encoding="ascii")
        tensors: dict[str, str] = {}
        for file in files:
            tensors |= _safetensors_digests(file) if file.suffix == ".safetensors" else _pytorch_digests(file)
        digest = _digest(tensors)
        if remembered:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            partial = remembered.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(digest, encoding="ascii")
            partial.replace(remembered)
    except OSError as error:
        raise ModelError(f"cannot take the fingerprint of {name}: {error}") from error
    return digest


def _safetensors_digests(file: Path) -> dict[str, str]:
    """Digest of every tensor by name, from the bytes on disk: nothing is copied, and hashlib gives up the GIL."""
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        (length,) = struct.unpack("<Q", view[:8])
        header = json.loads(bytes(view[8 : 8 + length]))
        header.pop("__metadata__", None)

        def digest(entry: dict[str, Any]) -> str:
            hashed = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
            begin, end = entry["data_offsets"]
            with view[8 + length + begin : 8 + length + end] as stored:
                hashed.update(stored)
            return hashed.hexdigest()

        return dict(zip(header, pool.map(digest, header.values()), strict=True))


def _pytorch_digests(file: Path) -> dict[str, str]:
    """The same for PyTorch's own format, read as transformers reads it: no code in it is run."""
    digests = {}
    for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
        hashed = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        digests[name] = hashed.hexdigest()
    return digests


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE and not key.startswith("_")
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
