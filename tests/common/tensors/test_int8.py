"""int8 updates: how far off they are, that they are the same everywhere, and that no faulty one is taken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from fedhds.errors import AdapterError
from fedhds.tensors.int8 import dequantize, quantize
from fedhds.tensors.manifest import AdapterManifest, FloatArray, Initial, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter, write_difference
from fedhds_server.rpc.validation import check_update
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 30), "q.lora_B.weight": (40, 2)})
A, B = MANIFEST.tensors
SCALES = f"{A.name}.scales"


def random(spec: TensorSpec) -> FloatArray:
    return np.random.default_rng(len(spec.name) + spec.shape[0]).normal(size=spec.shape).astype(np.float32)


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=1, max_dims=3, max_side=9),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.data(),
)
def test_a_value_is_off_by_half_its_scale_at_most(values: npt.NDArray[np.float32], data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from((None, *range(values.ndim))))
    levels, scales = quantize(values, axis)
    assert (levels.dtype.name, scales.dtype.name) == ("int8", "float32")
    assert levels.shape == values.shape
    assert scales.shape == (1 if axis is None else values.shape[axis],)
    assert (scales > 0).all()
    # One row per scale.
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(len(scales), -1)
    assert (scales <= np.maximum(np.abs(rows).max(axis=1) / 127 * (1 + 1e-6), np.finfo(np.float32).tiny)).all()
    restored = dequantize(levels, scales, axis)
    off = np.abs(restored.astype(np.float64) - values)
    off_rows = off.reshape(1, -1) if axis is None else np.moveaxis(off, axis, 0).reshape(len(scales), -1)
    assert (off_rows <= scales[:, None] * (0.5 + 1e-4)).all()
    assert np.allclose(dequantize(*quantize(restored, axis), axis), restored, rtol=1e-6, atol=1e-37)


def test_the_levels_and_scales_of_a_matrix_are_fixed() -> None:
    values = np.array([[1.0, -2.0], [0.25, 0.5]], np.float32)
    for axis, expected, scales in (
        (0, [[64, -127], [64, 127]], [2, 0.5]),
        (1, [[127, -127], [32, 32]], [1, 2]),
        (None, [[64, -127], [16, 32]], [2]),
    ):
        levels, found = quantize(values, axis)
        assert levels.tolist() == expected
        assert found.tolist() == (np.array(scales, np.float32) / np.float32(127)).tolist()


def test_vectors_and_tensors_without_a_scale_axis_are_written_and_read(tmp_path: Path) -> None:
    tensors = (
        TensorSpec("k.bias", (30,), "bias", Initial.zeros(), None),
        TensorSpec("k.ia3_l", (5,), "ia3_l", Initial.ones(), 0),
        TensorSpec("prompt_embeddings", (4, 3, 2), "prompt", Initial.uniform(0.5), None),
    )
    manifest = AdapterManifest(tensors, "{}")
    write_difference(tmp_path / "update", manifest, random)
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "update").items() if name.endswith(".scales")}
    assert shapes == {"k.bias.scales": (1,), "k.ia3_l.scales": (5,), "prompt_embeddings.scales": (1,)}
    with AdapterReader(tmp_path / "update", manifest, differences=True) as reader:
        for spec in tensors:
            off = np.abs(reader.tensor(spec) - random(spec))
            assert off.max() <= np.abs(random(spec)).max() / 127 * 0.5001


def test_an_update_is_a_quarter_of_the_bytes_and_the_same_bytes_again(tmp_path: Path) -> None:
    wide = lora_manifest({"q.lora_A.weight": (8, 4096), "q.lora_B.weight": (4096, 8)})
    first = write_difference(tmp_path / "first", wide, random)
    plain = write_adapter(tmp_path / "plain", wide, random, "float32")
    assert first.size / plain.size < 0.26
    assert write_difference(tmp_path / "second", wide, lambda spec: np.asfortranarray(random(spec))) == first


def test_what_is_written_is_read_and_says_that_it_is_a_difference(tmp_path: Path) -> None:
    write_difference(tmp_path / "update", MANIFEST, random)
    with AdapterReader(tmp_path / "update", MANIFEST, differences=True) as reader:
        assert reader.is_difference
        for spec in MANIFEST.tensors:
            read = reader.tensor(spec)
            assert (read == dequantize(*quantize(random(spec), spec.scale_axis), spec.scale_axis)).all()
            assert (read.shape, read.dtype.name) == (spec.shape, "float32")
    # The file is plain safetensors.
    assert {name: tensor.dtype.name for name, tensor in load_file(tmp_path / "update").items()} == {
        A.name: "int8",
        B.name: "int8",
        A.scales_name: "float32",
        B.scales_name: "float32",
    }
    write_adapter(tmp_path / "values", MANIFEST, random, "bfloat16")
    with AdapterReader(tmp_path / "values", MANIFEST, differences=True) as reader:
        assert not reader.is_difference


def test_a_difference_is_no_global_adapter(tmp_path: Path) -> None:
    write_difference(tmp_path / "update", MANIFEST, random)
    with pytest.raises(AdapterError, match="scales"):
        AdapterReader(tmp_path / "update", MANIFEST)


def test_a_value_that_is_not_finite_is_not_quantize(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"q\.lora_B\.weight holds values that are not finite"):
        write_difference(tmp_path / "u", MANIFEST, lambda s: np.full(s.shape, np.nan if s == B else 1, np.float32))


def scales_of(value: float) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({SCALES: np.array([1, value], np.float32)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scales_of(0), "scales that are not finite and above 0"),
        (scales_of(-1), "scales that are not finite and above 0"),
        (scales_of(np.nan), "scales that are not finite and above 0"),
        (scales_of(np.inf), "scales that are not finite and above 0"),
        (scales_of(3e38), "values that are not finite"),
        (lambda t: t.update({SCALES: np.ones(3, np.float32)}), "shape"),
        (lambda t: t.update({SCALES: np.ones((2, 1), np.float32)}), "shape"),
        (lambda t: t.update({SCALES: np.ones(2, np.float16)}), "travel as F32"),
        (lambda t: t.update({A.name: np.ones(A.shape, np.float32)}), "travel as I8"),
        (lambda t: t.update({A.name: np.ones((2, 29), np.int8)}), "shape"),
        (lambda t: t.pop(B.scales_name), "differ from the run's manifest"),
        (lambda t: t.pop(SCALES), "differ from the run's manifest"),
        (lambda t: t.update({"more.scales": np.ones(2, np.float32)}), "differ from the run's manifest"),
    ],
)
def test_a_faulty_int8_update_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    tensors: dict[str, Any] = {}
    for spec in MANIFEST.tensors:
        tensors[spec.name] = np.full(spec.shape, 127, np.int8)
        tensors[spec.scales_name] = np.ones(2, np.float32)
    change(tensors)
    save_file(tensors, tmp_path / "update")
    current = tmp_path / "current"
    write_adapter(current, MANIFEST, random, "float32")
    with pytest.raises(AdapterError, match=words):
        check_update(tmp_path / "update", MANIFEST, current=current, max_norm=0)


def test_an_int8_update_is_held_to_its_own_norm_and_to_finite_sums(tmp_path: Path) -> None:
    update, current = tmp_path / "update", tmp_path / "current"
    write_adapter(current, MANIFEST, lambda spec: np.full(spec.shape, 3e38, np.float32), "float32")
    write_difference(update, MANIFEST, lambda spec: np.full(spec.shape, -2, np.float32))
    norm = 2 * np.sqrt(140)
    check_update(update, MANIFEST, current=current, max_norm=norm * (1 + 1e-6))
    with pytest.raises(AdapterError, match="beyond --max-update-norm"):
        check_update(update, MANIFEST, current=current, max_norm=norm * (1 - 1e-6))
    write_difference(update, MANIFEST, lambda spec: np.full(spec.shape, 1e38, np.float32))
    with pytest.raises(AdapterError, match="leads to values that are not finite"):
        check_update(update, MANIFEST, current=current, max_norm=0)


@given(st.data())
def test_damage_anywhere_is_an_adapter_error_or_another_whole_update(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "update"
    write_difference(path, MANIFEST, lambda spec: spec.initial_value(1) + 1)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.integers(len(content) - 200, len(content)))])
    try:
        with AdapterReader(path, MANIFEST, differences=True) as reader:
            assert all(np.isfinite(reader.tensor(spec)).all() for spec in MANIFEST.tensors)
    except AdapterError:
        pass


def test_a_header_with_scales_alone_does_not_pass_for_floats(tmp_path: Path) -> None:
    header = json.dumps({SCALES: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "update").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(AdapterError, match="differ from the run's manifest"):
        AdapterReader(tmp_path / "update", MANIFEST, differences=True)
