"""Manifests of adapters for tests that have no model."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from fedhds.tensors.manifest import AdapterManifest, Initial, StopToken, TensorSpec


def lora_factor(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """The entry of a LoRA factor, by the end of its name."""
    if name.endswith(".lora_A.weight"):
        return TensorSpec(name, shape, "lora_A", Initial.uniform(1 / math.sqrt(shape[1])), 0)
    return TensorSpec(name, shape, "lora_B", Initial.zeros(), 1)


def lora_manifest(shapes: dict[str, tuple[int, ...]], config: str = "{}") -> AdapterManifest:
    """A manifest of LoRA factors by name."""
    return AdapterManifest(tuple(lora_factor(name, shapes[name]) for name in sorted(shapes)), config)


@st.composite
def manifests(draw: st.DrawFn) -> AdapterManifest:
    """Any manifest of small tensors."""
    texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.isprintable)
    names = draw(st.sets(texts.filter(lambda text: not text.endswith(".scales")), min_size=1, max_size=4))
    initials = st.sampled_from((Initial.zeros(), Initial.ones())) | st.builds(Initial.uniform, st.floats(1e-9, 1000))
    tensors = []
    for name in sorted(names):
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        role = draw(st.from_regex("[A-Za-z0-9_]{1,32}", fullmatch=True))
        axis = draw(st.none() | st.integers(0, len(shape) - 1))
        tensors.append(TensorSpec(name, shape, role, draw(initials), axis))
    shown = st.text(st.characters(codec="utf-8"), max_size=100).filter(
        lambda text: text.isprintable() and "`" not in text
    )
    stops = draw(st.lists(st.builds(StopToken, st.integers(0, 2**32 - 1), shown), max_size=3))
    config = draw(st.sampled_from(("{}", '{"r": 8, "target_modules": ["q"]}\n')))
    return AdapterManifest(tuple(tensors), config, tuple(stops))
