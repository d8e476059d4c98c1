"""The base model of a site: loaded by path or hub id, fingerprinted, and wrapped in the run's LoRA adapter."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from fedhds.adapter import AdapterManifest, AdapterReader, Artifact, TensorSpec, write_adapter
from fedhds.errors import ModelError
from fedhds.runspec import RunSpec
from fedhds.v1 import federation_pb2 as pb

logger = logging.getLogger(__name__)

# Of the configuration, what depends on where or by which version it was written, not on what the model computes.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_commit_hash")


@dataclass
class BaseModel:
    """A loaded causal LM. `weights` is the SHA-256 of its stored weights, `max_length` its longest row in tokens."""

    name: str
    model: Any
    tokenizer: Any
    weights: str
    max_length: int
    stored_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.model.device)


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
        """The base model with a PEFT folder's adapter; raises ModelError when the two do not fit."""
        with _explained(str(folder)):
            return cls(base, PeftModel.from_pretrained(base.model, folder).eval())


def load_base_model(name: str, *, revision: str = "", device: str = "auto", cache_dir: Path | None = None) -> BaseModel:
    """Loads a causal LM and its tokenizer; a local path makes no network call.

    On a CPU it computes in float32 (half precision is slow and coarse there), on a GPU in bfloat16 where that exists.
    `cache_dir` remembers the digests of large weight files by path, size and time. Raises ModelError.
    """
    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    local = Path(name).expanduser()
    if not local.is_dir() and (name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise ModelError(f"there is no model folder {name}; give a folder with a model or a hub id like org/name")
    source = str(local) if local.is_dir() else name
    options = {"revision": revision} if revision and not local.is_dir() else {}
    where = _device(device)
    with _explained(name):
        config = AutoConfig.from_pretrained(source, **options)
    tokenizer = _tokenizer(name, source, options)
    dtype = torch.bfloat16 if where.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    with _explained(name):
        model: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **options)
    with _explained(name):
        weights = _weights_digest(source, options, model, cache_dir)
    try:
        model.to(where)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"the model {name} does not fit on {where}; free memory there or use --device cpu") from error
    limits = (getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None))
    known = [limit for limit in (*limits, tokenizer.model_max_length) if isinstance(limit, int) and 0 < limit < 10**9]
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return BaseModel(name, model.eval(), tokenizer, weights, min(known, default=2**31 - 1), stored)


def fingerprint(base: BaseModel, template: str) -> pb.ModelFingerprint:
    """What must be equal at every site; `template` is the digest of the prompt template in effect."""
    config = {key: value for key, value in base.model.config.to_diff_dict().items() if key not in _VOLATILE}
    tokenizer = base.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by whoever last encoded a batch.
        backend.pop("truncation", None)
        backend.pop("padding", None)
    else:
        backend = tokenizer.get_vocab()
    vocabulary = {"backend": backend, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return pb.ModelFingerprint(
        weights=base.weights, config=_digest(config), tokenizer=_digest(vocabulary), template=template
    )


class AdapterModel(InferenceModel):
    """The base model with one LoRA adapter in float32; the base weights are frozen."""

    def __init__(self, base: BaseModel, spec: RunSpec) -> None:
        self._spec = spec
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in base.model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not base.model.get_output_embeddings()
        }
        targets = sorted(linear) if spec.lora_targets == ("all-linear",) else sorted(spec.lora_targets)
        unknown = sorted(set(targets) - linear)
        if unknown:
            raise ModelError(f"the model has no linear module {unknown[0]!r}; it has {', '.join(sorted(linear))}")
        conv = any(isinstance(m, Conv1D) for m in base.model.modules())
        config = LoraConfig(
            r=spec.lora_rank,
            lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # PEFT scales by any number
            lora_dropout=spec.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            bias="none",
            fan_in_fan_out=conv,
        )
        with warnings.catch_warnings():
            # PEFT says so where a model mixes GPT-2's Conv1D with linear layers, and does the right thing.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            super().__init__(base, get_peft_model(base.model, config, autocast_adapter_dtype=False))
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        self.module.eval()
        self._manifest = AdapterManifest(
            tuple(TensorSpec(name, tuple(tensor.shape)) for name, tensor in sorted(self._state().items())),
            tuple(targets),
        )

    def manifest(self) -> AdapterManifest:
        """Names and shapes as PEFT saves them, sorted by name."""
        return self._manifest

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's tensors."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def load(self, path: Path) -> None:
        """Sets the adapter from a safetensors file; raises AdapterError when it does not fit."""
        state = self._state()
        with AdapterReader(path, self._manifest) as reader, torch.no_grad():
            for spec in self._manifest.tensors:
                state[spec.name].copy_(torch.from_numpy(reader.tensor(spec)))

    def save(self, path: Path) -> Artifact:
        """Writes the adapter in the run's wire type."""
        state = self._state()
        return write_adapter(
            path, self._manifest, lambda spec: state[spec.name].detach().cpu().numpy(), self._spec.wire_dtype
        )

    def _state(self) -> dict[str, torch.Tensor]:
        # The parameters themselves, under the names that PEFT saves them by: writing to them sets the adapter.
        return dict(get_peft_model_state_dict(self.module, save_embedding_layers=False))


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no CUDA device here; use --device auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _tokenizer(name: str, source: str, options: dict[str, str]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise ModelError(
            f"the model {name} has no usable tokenizer ({type(error).__name__}); put its tokenizer files beside the "
            "weights"
        ) from error
    if not len(tokenizer) or tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no vocabulary or no end-of-text token; it cannot end an answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What transformers and safetensors throw at a bad model becomes one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load a causal language model from {name}: {first[:300]}; give a folder that holds one, or the "
            "id of one on the hub that this machine can reach"
        ) from error


def _weights_digest(source: str, options: dict[str, str], model: Any, cache_dir: Path | None) -> str:
    files = _weight_files(source, options)
    if not files:
        # Not stored as safetensors: the loaded values, which depend on nothing but the file and the dtype.
        tensors = {key: _tensor_digest(value) for key, value in model.state_dict().items()}
        return _digest({"dtype": str(model.dtype), "tensors": tensors})
    key = _digest([[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    remembered = cache_dir / "weights" / key if cache_dir else None
    if remembered and remembered.exists():
        return remembered.read_text(encoding="ascii")
    digests: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened, ThreadPoolExecutor() as pool:
            names = list(opened.keys())
            # hashlib gives up the GIL; tensors are read one batch of threads at a time, not all at once.
            digests.update(
                zip(names, pool.map(lambda name: _tensor_digest(opened.get_tensor(name)), names), strict=True)
            )
    digest = _digest(digests)
    if remembered:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        partial = remembered.with_suffix(".partial")
        partial.write_text(digest, encoding="ascii")
        partial.replace(remembered)
    return digest


def _weight_files(source: str, options: dict[str, str]) -> list[Path]:
    def found(name: str) -> Path | None:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
        return Path(path) if path else None

    index = found("model.safetensors.index.json")
    if index:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [path for name in names if (path := found(name))]
    single = found("model.safetensors")
    return [single] if single else []


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
