"""Adapters on disk: the same bytes for the same values, and nothing but AdapterError for whatever else a file holds."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedhds.errors import AdapterError, StorageError
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterDtype, AdapterReader, AdapterWriter, write_adapter
from tests.support.manifests import lora_manifest, manifests

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
A, B = MANIFEST.tensors
DTYPES: tuple[AdapterDtype, ...] = get_args(AdapterDtype)
NUMPY_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Header = dict[str, Any]


def counted(spec: TensorSpec) -> FloatArray:
    """Small whole numbers, which every wire type holds exactly."""
    return np.arange(np.prod(spec.shape), dtype=np.float32).reshape(spec.shape) - 3


def written(path: Path, dtype: AdapterDtype = "float32") -> Path:
    write_adapter(path, MANIFEST, counted, dtype)
    return path


def taken_apart(path: Path) -> tuple[Header, bytes]:
    """Header and tensor bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def put_together(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def opened(path: Path) -> None:
    AdapterReader(path, MANIFEST).close()


# Writing.


def test_the_bytes_of_an_adapter_are_fixed(tmp_path: Path) -> None:
    manifest = lora_manifest({"a.lora_A.weight": (1, 2), "a.lora_B.weight": (2, 1)})
    values = {"a.lora_A.weight": [[1, -2]], "a.lora_B.weight": [[0.5], [0]]}
    write_adapter(tmp_path / "adapter", manifest, lambda spec: np.array(values[spec.name], np.float32), "float32")
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a.lora_A.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"a.lora_B.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}}'
    )
    # Padded with blanks, so that tensors start at a multiple of 8.
    header += b" " * (-len(header) % 8)
    assert (tmp_path / "adapter").read_bytes() == put_together(header, struct.pack("<4f", 1, -2, 0.5, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_give_equal_bytes_however_they_lie_in_memory(tmp_path: Path, dtype: AdapterDtype) -> None:
    first = write_adapter(tmp_path / "first", MANIFEST, counted, dtype)
    second = write_adapter(tmp_path / "second", MANIFEST, lambda spec: np.asfortranarray(counted(spec)), dtype)
    assert first == second == Artifact.of_file(tmp_path / "first") == Artifact.of_file(tmp_path / "second")
    changed = write_adapter(tmp_path / "third", MANIFEST, lambda spec: counted(spec) + (spec == B), dtype)
    assert changed.digest != first.digest


def test_tensors_are_asked_for_one_after_the_other_and_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path, asked = tmp_path / "adapter", []

    def tensor(spec: TensorSpec) -> FloatArray:
        assert not path.exists()
        asked.append(spec)
        return counted(spec)

    write_adapter(path, MANIFEST, tensor, "float32")
    assert asked == [A, B]
    assert list(tmp_path.iterdir()) == [path]


def test_an_array_of_another_shape_is_refused_and_the_file_before_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "adapter")
    before = path.read_bytes()
    with pytest.raises(AdapterError, match=r"q\.lora_B\.weight has shape \(2, 4\), the manifest says \(4, 2\)"):
        write_adapter(path, MANIFEST, lambda spec: counted(spec).T if spec == B else counted(spec), "float32")
    assert path.read_bytes() == before


def test_a_full_disk_is_a_named_error_and_the_file_before_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "adapter")
    before = path.read_bytes()
    (tmp_path / "adapter.partial").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        write_adapter(path, MANIFEST, lambda spec: counted(spec) + 1, "float32")
    assert path.read_bytes() == before


def test_several_files_are_written_side_by_side(tmp_path: Path) -> None:
    with AdapterWriter.open(tmp_path / "one", MANIFEST) as one, AdapterWriter.open(tmp_path / "two", MANIFEST) as two:
        for spec in MANIFEST.tensors:
            one.add(spec, counted(spec))
            two.add(spec, counted(spec) + 1)
            assert not (tmp_path / "one").exists()
    assert one.artifact == write_adapter(tmp_path / "again", MANIFEST, counted, "float32")
    assert two.artifact == Artifact.of_file(tmp_path / "two") != one.artifact


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((B,), "q.lora_B.weight is not the next tensor"),
        ((A, A), "q.lora_A.weight is not the next tensor"),
        ((A, B, B), "q.lora_B.weight is not the next tensor"),
        ((A,), "q.lora_B.weight was not written"),
    ],
)
def test_tensors_out_of_order_or_lacking_leave_no_file(
    tmp_path: Path, order: tuple[TensorSpec, ...], words: str
) -> None:
    def write() -> None:
        with AdapterWriter.open(tmp_path / "adapter", MANIFEST) as writer:
            for spec in order:
                writer.add(spec, counted(spec))

    with pytest.raises(AdapterError, match=words):
        write()
    assert not list(tmp_path.iterdir())


# Reading.


@settings(max_examples=60, deadline=None)
@given(manifests(), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_what_is_written_is_read_and_written_again_bit_for_bit(
    manifest: AdapterManifest, dtype: AdapterDtype, seed: int
) -> None:
    kind = np.dtype(NUMPY_TYPES[dtype])
    random = np.random.default_rng(seed)

    def draw(spec: TensorSpec) -> FloatArray:
        # Any bits: subnormal, negative zero, the largest; what is not finite becomes 1.
        values = np.frombuffer(random.bytes(kind.itemsize * int(np.prod(spec.shape))), dtype=kind)
        widened = values.astype(np.float32).reshape(spec.shape)
        return np.where(np.isfinite(widened), widened, np.float32(1))

    tensors = {spec: draw(spec) for spec in manifest.tensors}
    with TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        artifact = write_adapter(first, manifest, tensors.__getitem__, dtype)
        with AdapterReader(first, manifest) as reader:
            for spec, values in tensors.items():
                found = reader.tensor(spec)
                assert found.dtype == np.float32
                assert found.tobytes() == values.tobytes()
            assert write_adapter(second, manifest, reader.tensor, dtype) == artifact


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_what_is_written(tmp_path: Path, dtype: AdapterDtype) -> None:
    found = load_file(written(tmp_path / "adapter", dtype))
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        spec.name: counted(spec).tolist() for spec in MANIFEST.tensors
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metadata", [None, {"format": "pt", "made": "elsewhere"}])
def test_what_the_safetensors_library_writes_is_read(
    tmp_path: Path, dtype: AdapterDtype, metadata: dict[str, str] | None
) -> None:
    tensors = {spec.name: torch.from_numpy(counted(spec)).to(getattr(torch, dtype)) for spec in (B, A)}
    save_file(tensors, tmp_path / "adapter", metadata)
    with AdapterReader(tmp_path / "adapter", MANIFEST) as reader:
        for spec in MANIFEST.tensors:
            assert np.array_equal(reader.tensor(spec), counted(spec))


def test_a_tensor_is_a_copy_that_outlives_the_reader(tmp_path: Path) -> None:
    path = written(tmp_path / "adapter")
    with AdapterReader(path, MANIFEST) as reader:
        first, second = reader.tensor(A), reader.tensor(A)
    first += 1
    assert np.array_equal(second, counted(A))
    assert Artifact.of_file(path) == Artifact.of_file(written(tmp_path / "again"))


# Files that are no adapter of the run.


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    content = written(tmp_path / "adapter").read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(AdapterError):
            opened(cut)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "shorter than a safetensors header"),
        (bytes(7), "shorter than a safetensors header"),
        (struct.pack("<Q", 3) + b"{}", "longer than the file"),
        (struct.pack("<Q", 1 << 63) + b"{}", "longer than the file"),
        (put_together(b"", b""), "not JSON"),
        (put_together(b'{"a":', b""), "not JSON"),
        (put_together(b'{"a": "\xff\xfe"}', b""), "not JSON"),
        (put_together(b"[" * 4_500, b""), "not JSON"),
        (put_together(b"9" * 4_500, b""), "not JSON"),
        (put_together(b"[]", b""), "not a JSON object"),
        (put_together(b"{}", b""), "2 of them; the first is 'q.lora_A.weight'"),
    ],
)
def test_a_file_without_a_safetensors_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=words):
        opened(path)


def test_a_header_longer_than_any_adapter_needs_is_refused_though_the_file_holds_it(tmp_path: Path) -> None:
    # A file of holes: it takes no room.
    with (tmp_path / "adapter").open("wb") as file:
        file.write(struct.pack("<Q", 1 << 20))
        file.truncate(2 << 20)
    with pytest.raises(AdapterError, match="longer than the file or than the run's tensors need"):
        opened(tmp_path / "adapter")


def _set(**fields: object) -> Callable[[Header], object]:
    return lambda header: header[A.name].update(fields)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda header: header.pop(A.name), r"1 of them; the first is 'q\.lora_A\.weight'"),
        (lambda header: header.update(extra=header[A.name]), "1 of them; the first is 'extra'"),
        (lambda header: header.update(p=header.pop(A.name)), "2 of them; the first is 'p'"),
        (lambda header: header.update({A.name: [1, 2]}), r"entry for q\.lora_A\.weight is malformed"),
        (lambda header: header[A.name].pop("dtype"), "malformed"),
        (_set(dtype=32), "malformed"),
        (_set(shape="2, 3"), "malformed"),
        (_set(data_offsets=[0, 24, 48]), "malformed"),
        (_set(data_offsets=[0, "24"]), "malformed"),
        (_set(data_offsets=[0.0, 24.0]), "malformed"),
        (_set(shape=[3, 2]), r"q\.lora_A\.weight has shape \(3, 2\), the run's manifest says \(2, 3\)"),
        (_set(shape=[6]), r"has shape \(6,\)"),
        (_set(shape=[[2], 3]), "has shape"),
        (_set(dtype="F64"), "has type 'F64'; adapters travel as F32, BF16 or F16"),
        (_set(dtype="I32"), "has type 'I32'"),
        (_set(dtype="F16"), "byte offsets that do not fit"),
        (_set(data_offsets=[0, 20]), "byte offsets that do not fit"),
        (_set(data_offsets=[-24, 0]), "byte offsets that do not fit"),
        (_set(data_offsets=[24, 0]), "byte offsets that do not fit"),
        (_set(data_offsets=[40, 64]), "byte offsets that do not fit"),
        (_set(data_offsets=[1 << 70, (1 << 70) + 24]), "byte offsets that do not fit"),
    ],
)
def test_tensors_that_differ_from_the_manifest_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[Header], object], words: str
) -> None:
    header, payload = taken_apart(written(tmp_path / "adapter"))
    spoil(header)
    (tmp_path / "spoiled").write_bytes(put_together(json.dumps(header).encode(), payload))
    with pytest.raises(AdapterError, match=words):
        opened(tmp_path / "spoiled")


@pytest.mark.parametrize(
    "spoil",
    [
        _set(dtype="\ud800"),
        _set(dtype="x" * 1_000_000),
        _set(shape=["\ud800"] * 100_000),
        lambda header: header.update({"\ud800" * 1_000_000: {}}),
    ],
)
def test_an_error_quotes_a_hostile_header_briefly_and_in_characters_that_travel(
    tmp_path: Path, spoil: Callable[[Header], object]
) -> None:
    header, payload = taken_apart(written(tmp_path / "adapter"))
    spoil(header)
    (tmp_path / "spoiled").write_bytes(put_together(json.dumps(header).encode(), payload))
    with pytest.raises(AdapterError) as caught:
        opened(tmp_path / "spoiled")
    # A lone surrogate could be neither sent nor saved.
    assert len(str(caught.value).encode("utf-8")) < 2_000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_naming_its_tensor(
    tmp_path: Path, dtype: AdapterDtype, value: float
) -> None:
    path = written(tmp_path / "adapter", dtype)
    odd = np.array([value], dtype=NUMPY_TYPES[dtype]).tobytes()
    path.write_bytes(path.read_bytes()[: -len(odd)] + odd)
    with AdapterReader(path, MANIFEST) as reader:
        assert np.array_equal(reader.tensor(A), counted(A))
        with pytest.raises(AdapterError, match=r"q\.lora_B\.weight holds values that are not finite"):
            reader.tensor(B)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_anywhere_is_an_adapter_error_or_another_whole_adapter(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = written(Path(folder) / "adapter", data.draw(st.sampled_from(DTYPES)))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            with AdapterReader(path, MANIFEST) as reader:
                tensors = [reader.tensor(spec) for spec in MANIFEST.tensors]
        except AdapterError:
            return
        assert [tensor.shape for tensor in tensors] == [A.shape, B.shape]
        assert all(np.isfinite(tensor).all() for tensor in tensors)


def test_a_file_that_is_cut_after_it_was_opened_is_a_named_error(tmp_path: Path) -> None:
    path = written(tmp_path / "adapter")
    with AdapterReader(path, MANIFEST) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(AdapterError, match=f"{MANIFEST.tensors[-1].name} ends before its last byte"):
            reader.tensor(MANIFEST.tensors[-1])
