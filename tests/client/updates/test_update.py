"""A finished update on disk: found again, replaced by the next, and what int8 rounds away of it made up for later."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedhds.errors import StorageError
from fedhds.spec import AggregationSpec, WireDtype
from fedhds.tensors.codecs import CODECS
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_client.updates.update import FinishedUpdate, keep_update
from fedhds_server.aggregation import AGGREGATORS, Update, aggregate
from fedhds_server.optimizers import OPTIMIZERS
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
A, B = MANIFEST.tensors
OUTCOME: Any = SimpleNamespace(
    samples=5, loss_rows=5, loss=1.5, seconds=2.0, truncated_rows=1, response_tokens=40, tokens_per_s=50.0
)
# Of a rank with one large value the small ones are less than half a step: quantized each by itself they never count.
LEARNED = {A.name: np.array([[1.0, 0.003, -0.001], [0.5, 0.001, 0.0]]), B.name: np.full((4, 2), 0.1)}
LEARNED[B.name][0, 0] = 40.0


Start = Callable[[TensorSpec], FloatArray]


class Model:
    """What an update is made of: the tensors of a model that has been trained."""

    def __init__(self, wire_dtype: WireDtype, start: Start) -> None:
        self.codec = CODECS[wire_dtype]
        self._start = start

    def manifest(self) -> AdapterManifest:
        return MANIFEST

    def values(self) -> Callable[[TensorSpec], FloatArray]:
        return lambda spec: self._start(spec) + LEARNED[spec.name].astype(np.float32)


def zeros(spec: TensorSpec) -> FloatArray:
    return np.zeros(spec.shape, np.float32)


def tensors(path: Path) -> dict[str, FloatArray]:
    with AdapterReader(path, MANIFEST, differences=True) as reader:
        return {spec.name: reader.tensor(spec) for spec in MANIFEST.tensors}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "global", MANIFEST, zeros, "float32")
    return tmp_path / "global"


def kept(
    folder: Path,
    adapter: Path,
    number: int,
    dtype: WireDtype = "int8",
    start: Start = zeros,
) -> FinishedUpdate:
    model: Any = Model(dtype, start)
    return keep_update(folder / "run" / f"update-{number}.safetensors", model, adapter, OUTCOME, round_number=number)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_finished_update_is_found_again_and_goes_with_the_next(
    tmp_path: Path, adapter: Path, dtype: WireDtype
) -> None:
    first = kept(tmp_path, adapter, 1, dtype)
    assert FinishedUpdate.load(first.path) == first
    result = first.result()
    assert (result.samples, result.loss, result.truncated_rows) == (5, 1.5, 1)
    assert result.update.digest == first.artifact.digest
    # A loss over fewer rows than the site's floor stays at home; all else is the same.
    quiet = first.result(min_rows=6)
    assert not any(quiet.HasField(name) for name in ("loss", "response_tokens", "tokens_per_s"))
    assert first.result(min_rows=5) == result
    quiet.loss, quiet.response_tokens, quiet.tokens_per_s = 1.5, 40, 50.0
    assert quiet == result
    second = kept(tmp_path, adapter, 2, dtype)
    assert FinishedUpdate.load(first.path) is None
    assert FinishedUpdate.load(second.path) == second
    left = {"update-2.json", "update-2.safetensors"} | ({"update-2.residual"} if dtype == "int8" else set())
    assert {path.name for path in (tmp_path / "run").iterdir()} == left


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"digest": 1, "more": 2}'])
def test_an_update_with_a_damaged_note_or_damaged_tensors_is_not_taken(
    tmp_path: Path, adapter: Path, content: str
) -> None:
    update = kept(tmp_path, adapter, 1)
    note = update.path.with_suffix(".json")
    whole = note.read_text()
    note.write_text(content)
    assert FinishedUpdate.load(update.path) is None
    note.write_text(whole)
    update.path.write_bytes(update.path.read_bytes()[:-1] + b"?")
    assert FinishedUpdate.load(update.path) is None


def test_what_is_rounded_away_is_made_up_for_by_later_updates(tmp_path: Path, adapter: Path) -> None:
    rounds = 40
    sums = {name: np.zeros(values.shape) for name, values in LEARNED.items()}
    alone = {name: np.zeros(values.shape) for name, values in LEARNED.items()}
    for number in range(1, rounds + 1):
        for name, sent in tensors(kept(tmp_path, adapter, number).path).items():
            sums[name] += sent
        for name, sent in tensors(kept(tmp_path / f"fresh-{number}", adapter, 1).path).items():
            alone[name] += sent
    for name, learned in LEARNED.items():
        step = np.abs(learned).max() / 127
        # What is missing of all rounds together is less than one step of the last one ...
        assert np.abs(sums[name] - rounds * learned).max() <= step
        # ... and without feedback it is all of what is small, every round.
        assert np.abs(alone[name] - rounds * learned).max() > 10 * step
    assert alone[A.name][0, 1] == 0
    assert sums[A.name][0, 1] == pytest.approx(rounds * 0.003, abs=1 / 127)


def test_the_coordinator_adds_the_difference_to_the_adapter_that_it_was_made_from(tmp_path: Path) -> None:
    def start(spec: TensorSpec) -> FloatArray:
        return np.full(spec.shape, 100.0, np.float32)

    base = tmp_path / "base"
    write_adapter(base, MANIFEST, start, "float32")
    one, two = kept(tmp_path / "a", base, 1, start=start), kept(tmp_path / "b", base, 1, "float32", start=start)
    updates = [Update("a", one.path, 0.25), Update("b", two.path, 0.75)]
    settings = AggregationSpec()
    aggregate(
        MANIFEST,
        base,
        updates,
        aggregator=AGGREGATORS[settings.aggregator.name],
        optimizer=OPTIMIZERS[settings.optimizer.name],
        spec=settings,
        slots={},
        scratch=lambda name: tmp_path / name,
        round_number=1,
    )
    with AdapterReader(tmp_path / "aggregate", MANIFEST) as reader:
        for spec in MANIFEST.tensors:
            off = np.abs(reader.tensor(spec) - start(spec) - LEARNED[spec.name])
            assert off.max() <= np.abs(LEARNED[spec.name]).max() / 127 / 2 / 4 + 1e-4


def test_what_is_rounded_away_waits_while_a_tensor_does_not_train(tmp_path: Path, adapter: Path) -> None:
    """The coordinator leaves such a tensor as it is, whatever the update has for it."""

    class OnlyA(Model):
        def values(self) -> Callable[[TensorSpec], FloatArray]:
            learned = super().values()
            return lambda spec: learned(spec) if spec.role == A.role else zeros(spec)

    before = tensors(kept(tmp_path, adapter, 1).path.with_suffix(".residual"))
    assert np.abs(before[B.name]).max() > 0
    model: Any = OnlyA("int8", zeros)
    path = tmp_path / "run" / "update-2.safetensors"
    keep_update(path, model, adapter, OUTCOME, round_number=2, trainable_roles=frozenset({A.role}))
    with AdapterReader(path, MANIFEST.only(frozenset({A.role})), differences=True) as reader:
        assert reader.tensor(A).any()
    after = tensors(path.with_suffix(".residual"))
    np.testing.assert_array_equal(after[B.name], before[B.name])
    assert not np.array_equal(after[A.name], before[A.name])


@pytest.mark.parametrize("damage", ["flip", "delete", "note"])
def test_a_lost_residual_is_said_and_the_site_goes_on_without(
    tmp_path: Path, adapter: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    residual = kept(tmp_path, adapter, 1).path.with_suffix(".residual")
    match damage:
        case "flip":
            residual.write_bytes(residual.read_bytes()[:-1] + b"\x40")
        case "delete":
            residual.unlink()
        case _:
            residual.with_suffix(".json").write_text("?")
    second = kept(tmp_path, adapter, 2)
    assert "lost" in caplog.text
    assert "starts without it" in caplog.text
    assert second.path.read_bytes() == kept(tmp_path / "fresh", adapter, 1).path.read_bytes()


def test_a_site_whose_state_folder_is_gone_says_so(
    tmp_path: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kept(tmp_path, adapter, 3)
    assert "there is no earlier update of this run" in caplog.text


def test_an_update_that_is_made_again_takes_what_the_one_before_left(tmp_path: Path, adapter: Path) -> None:
    """A crash between the second update's files and its note: made again, it is the same."""
    first = kept(tmp_path, adapter, 1)
    before = {path: path.read_bytes() for path in first.path.parent.iterdir()}
    second = kept(tmp_path, adapter, 2)
    second.path.with_suffix(".json").unlink()
    for path, content in before.items():
        path.write_bytes(content)
    assert kept(tmp_path, adapter, 2) == second


def test_a_folder_that_cannot_be_written_is_a_named_error(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(StorageError, match="cannot keep the update"):
        kept(tmp_path, adapter, 1)
