"""Manifests: what describes no adapter is refused, and first values follow from the run's seed and the name alone."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from fedhds.errors import AdapterError
from fedhds.tensors.manifest import AdapterManifest, Initial, InitialKind, StopToken, TensorSpec
from fedhds.v2 import federation_pb2 as pb
from tests.support.manifests import lora_factor, lora_manifest, manifests

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
A, B = MANIFEST.tensors
VECTOR = TensorSpec("k.ia3_l", (6,), "ia3_l", Initial.ones(), None)


# The wire.


@given(manifests())
def test_a_manifest_survives_the_wire(manifest: AdapterManifest) -> None:
    message = pb.AdapterManifest.FromString(manifest.to_proto().SerializeToString())
    assert AdapterManifest.from_proto(message) == manifest


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((), "at least one tensor"),
        ((B, A), "sorted by name"),
        ((A, A), "each once"),
        ((replace(A, name=""),), "with no, more than 500"),
        ((replace(A, name="q\n12:00:00 INFO all is well\x1b[2J.lora_A.weight"),), "unprintable"),
        ((replace(A, name="q" * 500 + ".lora_A.weight"),), "more than 500"),
        ((replace(A, name="__metadata__"),), "'__metadata__', which a safetensors file cannot hold"),
        ((VECTOR, replace(VECTOR, name="k.ia3_l.scales")), "'k.ia3_l.scales', the name of another tensor's scales"),
        ((replace(A, shape=()),), "not a tensor's"),
        ((replace(A, shape=(1,) * 9),), "not a tensor's"),
        ((replace(A, shape=(2, 0)),), "not a tensor's"),
        ((replace(A, shape=(1 << 20, 1 << 20)),), "beyond any model's"),
        ((replace(A, shape=(2, (1 << 64) - 1)),), "beyond any model's"),
        ((replace(A, role=""),), "a role that is not 1 to 32"),
        ((replace(A, role="a" * 33),), "a role that is not 1 to 32"),
        ((replace(A, role="lora-A"),), "a role that is not 1 to 32"),
        ((replace(A, role="lora_A\n"),), "a role that is not 1 to 32"),
        ((replace(A, role="löra"),), "a role that is not 1 to 32"),
        ((replace(A, initial=Initial.uniform(0)),), "uniform at first, the bound 0.0, not above 0"),
        ((replace(A, initial=Initial.uniform(-1)),), "not above 0"),
        ((replace(A, initial=Initial.uniform(math.nan)),), "not above 0"),
        ((replace(A, initial=Initial.uniform(math.inf)),), "at most 1000"),
        ((replace(A, initial=Initial.uniform(1000.5)),), "at most 1000"),
        ((replace(B, initial=Initial(InitialKind.ZEROS, 0.5)),), "zeros at first, the bound 0.5, not 0"),
        ((replace(B, initial=Initial(InitialKind.ONES, math.nan)),), "ones at first, the bound nan, not 0"),
        ((replace(B, initial=Initial(InitialKind.BASE)),), "base at first, the digest '', not one of 64 hexadecimal"),
        ((replace(B, initial=Initial(InitialKind.BASE, digest="A" * 64)),), "not one of 64 hexadecimal"),
        ((replace(B, initial=Initial(InitialKind.BASE, 0.5, "a" * 64)),), "base at first, the bound 0.5, not 0"),
        ((replace(B, initial=Initial(InitialKind.ZEROS, digest="a" * 64)),), "zeros at first, the digest .* not none"),
        ((replace(A, scale_axis=2),), r"along axis 2, which its shape \(2, 3\) lacks"),
        ((replace(VECTOR, scale_axis=1),), "along axis 1"),
    ],
)
def test_a_manifest_of_no_adapter_is_refused(tensors: tuple[TensorSpec, ...], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        AdapterManifest.from_proto(AdapterManifest(tensors, "{}").to_proto())


def test_stop_tokens_that_a_model_card_cannot_show_or_too_many_of_them_are_refused() -> None:
    def read(*tokens: StopToken) -> AdapterManifest:
        return AdapterManifest.from_proto(replace(MANIFEST, stop_tokens=tokens).to_proto())

    full = tuple(StopToken(index, "x" * 100) for index in range(16))
    assert read(*full).stop_tokens == full
    with pytest.raises(AdapterError, match="17 stop tokens, more than 16"):
        read(*full, StopToken(16, ""))
    for text in ("x" * 101, "a\nb", "`", "\x1b[2J"):
        with pytest.raises(AdapterError, match="stop token 7 a text that a model card cannot show"):
            read(StopToken(7, text))
        assert StopToken.of(7, text) == StopToken(7, "")
    assert StopToken.of(7, "<|im_end|>").text == "<|im_end|>"


def test_the_generation_config_names_all_stop_tokens_and_sites_must_agree_on_them() -> None:
    assert MANIFEST.generation_config == ""
    ended = replace(MANIFEST, stop_tokens=(StopToken(9, "<|im_end|>"), StopToken(2, "</s>")))
    assert json.loads(ended.generation_config) == {"eos_token_id": [9, 2]}
    assert ended.agrees_with(ended)
    # One of an earlier version, which goes on with new sites.
    assert ended.agrees_with(MANIFEST)
    assert not ended.agrees_with(replace(ended, stop_tokens=ended.stop_tokens[::-1]))


@pytest.mark.parametrize("initial", [pb.INITIAL_KIND_UNSPECIFIED, 77])
def test_a_first_value_of_no_known_kind_is_refused(initial: Any) -> None:
    message = MANIFEST.to_proto()
    message.tensors[0].initial = initial
    with pytest.raises(AdapterError, match=r"does not say how the first value of 'q\.lora_A\.weight' is made"):
        AdapterManifest.from_proto(message)


# The configuration.


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 60_000, "not JSON"),
        ("9" * 10_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('"{}"', "not a JSON object"),
        (json.dumps({"a": "x" * (64 << 10)}), "longer than 64 KiB"),
        # Counted in bytes, not in characters.
        ('{"a": "' + "ä" * (33 << 10) + '"}', "longer than 64 KiB"),
    ],
)
def test_a_configuration_that_is_no_object_or_too_long_is_refused(config: str, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        AdapterManifest.from_proto(replace(MANIFEST, config=config).to_proto())


def test_a_configuration_of_the_largest_size_is_taken() -> None:
    whole = replace(MANIFEST, config='{"a": "' + "x" * ((64 << 10) - 9) + '"}')
    assert len(whole.config) == 64 << 10
    assert AdapterManifest.from_proto(whole.to_proto()) == whole


@pytest.mark.parametrize(
    ("ours", "theirs", "agree"),
    [
        ('{"r": 8, "bias": "none"}', '{\n "bias": "none",\n "r": 8.0}\n', True),
        ('{"r": 8, "peft_version": "0.21.2"}', '{"r": 8, "peft_version": "0.22.0"}', True),
        ('{"r": 8}', '{"r": 8, "peft_version": "0.22.0"}', True),
        ('{"r": 8}', '{"r": 9}', False),
        ('{"r": 8}', '{"r": 8, "use_dora": false}', False),
        ('{"target_modules": ["a", "b"]}', '{"target_modules": ["b", "a"]}', False),
        ('{"nested": {"peft_version": 1}}', '{"nested": {"peft_version": 2}}', False),
    ],
)
def test_configurations_agree_as_json_apart_from_the_version_of_peft(ours: str, theirs: str, agree: bool) -> None:
    first, second = replace(MANIFEST, config=ours), replace(MANIFEST, config=theirs)
    assert first.agrees_with(second) is second.agrees_with(first) is agree


@pytest.mark.parametrize(
    "other",
    [
        replace(A, shape=(2, 4)),
        replace(A, role="lora_embedding_A"),
        replace(A, initial=Initial.ones()),
        replace(A, initial=Initial.uniform(0.5)),
        replace(A, scale_axis=None),
    ],
)
def test_manifests_agree_in_every_field_of_their_tensors(other: TensorSpec) -> None:
    assert not MANIFEST.agrees_with(replace(MANIFEST, tensors=(other, B)))


# First values.


def test_a_uniform_first_value_keeps_within_its_bound() -> None:
    wide = lora_factor("q.lora_A.weight", (64, 400))
    values = wide.initial_value(1)
    bound = 1 / np.sqrt(400)
    assert values.shape == wide.shape
    assert values.dtype == np.float32
    assert 0.99 * bound < np.abs(values).max() <= np.float32(bound)
    # Standard deviation and mean of a uniform distribution, within five standard errors.
    assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)


@pytest.mark.parametrize(("initial", "value"), [(Initial.zeros(), 0), (Initial.ones(), 1)])
@pytest.mark.parametrize("shape", [(6,), (400, 64), (2, 3, 4)])
def test_a_constant_first_value_fills_the_shape(initial: Initial, value: float, shape: tuple[int, ...]) -> None:
    values = replace(A, shape=shape, initial=initial).initial_value(1)
    assert values.shape == shape
    assert values.dtype == np.float32
    assert (values == value).all()


def test_a_large_first_value_is_drawn_in_blocks_and_is_that_of_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = lora_factor("q.lora_A.weight", (8, 100))
    whole = wide.initial_value(1)
    monkeypatch.setattr("fedhds.tensors.manifest._BLOCK", 7)
    assert np.array_equal(wide.initial_value(1), whole)


def test_first_values_follow_from_seed_and_name_alone() -> None:
    other = lora_factor("k.lora_A.weight", A.shape)
    draws = {(spec, seed): spec.initial_value(seed) for spec in (A, other) for seed in (0, 1, 2**63 - 1)}
    assert len({values.tobytes() for values in draws.values()}) == len(draws)
    for (spec, seed), values in reversed(draws.items()):
        assert np.array_equal(spec.initial_value(seed), values)


def test_the_first_values_of_a_seed_are_fixed() -> None:
    """A coordinator of another version goes on with a run only if it draws the same adapter."""
    digest = "a4be2593717b56b7070e981375df2cad222b1074775942572e49b7a9d308829c"
    assert hashlib.sha256(A.initial_value(42).tobytes()).hexdigest() == digest
