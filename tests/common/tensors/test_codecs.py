"""Wire types: every one that a run may name is there, and says how its updates are to be read."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from fedhds.spec import RunSpec, WireDtype
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.codecs import CODECS
from fedhds.tensors.safetensors import AdapterReader
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})


def test_every_wire_type_of_a_run_has_a_codec_of_its_name() -> None:
    assert set(get_args(WireDtype)) == set(CODECS)
    assert all(codec.name == name for name, codec in CODECS.items())


@pytest.mark.parametrize(
    ("name", "adapter_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("int8", "float32")],
)
def test_the_global_adapter_is_never_rounded_to_int8(name: str, adapter_dtype: str) -> None:
    assert CODECS[name].adapter_dtype == adapter_dtype
    assert RunSpec.of(model="m", rounds=1, wire_dtype=name).aggregation.adapter_dtype == adapter_dtype


@pytest.mark.parametrize("name", CODECS)
def test_an_update_is_read_as_what_its_codec_says(tmp_path: Path, name: str) -> None:
    artifact = CODECS[name].write(tmp_path / "update", MANIFEST, lambda spec: np.full(spec.shape, 0.5, np.float32))
    assert artifact == Artifact.of_file(tmp_path / "update")
    with AdapterReader(tmp_path / "update", MANIFEST, differences=True) as reader:
        assert reader.is_difference is CODECS[name].is_difference
        assert all(np.allclose(reader.tensor(spec), 0.5) for spec in MANIFEST.tensors)
