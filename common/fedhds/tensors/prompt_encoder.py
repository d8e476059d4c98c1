"""P-tuning's virtual tokens: what PEFT saves of the network that trains, computed with numpy alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fedhds.tensors.manifest import AdapterManifest, Initial, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter

# Of torch.nn.Sequential: linear layers, with a ReLU after the first two.
_LAYERS = ("0", "2", "4")


def write_prompt_embeddings(adapter: Path, manifest: AdapterManifest, path: Path, name: str) -> None:
    """Writes the tensor `name`, float32 (virtual tokens, width), that the network of the file `adapter` gives.

    Raises AdapterError when that is no prompt encoder of `manifest`, StorageError when the file cannot be written.
    """
    with AdapterReader(adapter, manifest) as reader:
        tensors = {tensor.name: reader.tensor(tensor) for tensor in manifest.tensors}
    values = tensors["embedding.weight"]
    for layer in _LAYERS:
        values = values @ tensors[f"mlp_head.{layer}.weight"].T + tensors[f"mlp_head.{layer}.bias"]
        if layer != _LAYERS[-1]:
            values = np.maximum(values, 0)
    saved = TensorSpec(name, values.shape, name, Initial.zeros(), None)
    write_adapter(path, replace(manifest, tensors=(saved,)), lambda _: values, "float32")
