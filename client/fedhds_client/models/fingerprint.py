"""The fingerprint of a base model: digests of what must be equal at every site."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedhds.errors import ModelError
from fedhds.runtime.files import replace_file
from fedhds.v2 import federation_pb2 as pb

if TYPE_CHECKING:
    from fedhds_client.models.loading import BaseModel

# Of the configuration, what depends on where, by which version or for which class it was written, not on what the
# model computes: `architectures` is one of these, for the class comes from model_type.
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def fingerprint(base: BaseModel, template: str) -> pb.ModelFingerprint:
    """What must be equal at every site, as SHA-256; `template` is the digest of the prompt template in effect."""
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else base.tokenizer.get_vocab()
    if backend is not None:
        # Set by the last encoding of a batch.
        vocabulary |= {"truncation": None, "padding": None}
    special = {name: str(token) for name, token in base.tokenizer.special_tokens_map.items()}
    return pb.ModelFingerprint(
        weights=base.weights,
        config=_digest(_lasting(base.model.config.to_diff_dict())),
        tokenizer=_digest({"vocabulary": vocabulary, "special": special}),
        template=template,
    )


def digest_of(whole: pb.ModelFingerprint) -> str:
    """One SHA-256 over the fingerprint of a feature model."""
    return hashlib.sha256(whole.SerializeToString(deterministic=True)).hexdigest()


def weights_digest(name: str, files: tuple[Path, ...], cache_dir: Path | None) -> str:
    """SHA-256 over all tensors in `files`, remembered in `cache_dir`; `name` is the model's, for messages.

    Raises ModelError when there are no files or they cannot be read, StorageError when the digest cannot be kept.
    """
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
    except OSError as error:
        raise ModelError(f"cannot take the fingerprint of {name}: {error}") from error
    if remembered:
        replace_file(remembered, digest, shared=True)
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


def _lasting(config: dict[Any, Any]) -> dict[str, Any]:
    """Without what is volatile or private; all keys are text, as in JSON, where a label's number is one, too."""
    return {
        str(key): _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE and not str(key).startswith("_")
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
