"""Where updates are: inner products of what they change, and how far FedAvg is from the mean of LoRA's products.

An update of LoRA changes the product B A, so inner products are those of B_i A_i - B A. With dB = B_i - B and
dA = A_i - A this is dB A_i + B dA, and its products with others' need r x r matrices alone: never a dense weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt

from fedhds.tensors.manifest import TensorSpec

Doubles = npt.NDArray[np.float64]
Differences = Callable[[int, TensorSpec], npt.NDArray[np.float32]]
"""What the i-th update adds to a tensor of the global adapter."""

# What blocks of updates take at a time, in bytes of float64, and values in one side of their Gram matrix.
BLOCK_BYTES = 32 << 20
_MAX_SIDE = 2048


@dataclass(slots=True)
class Geometry:
    """Inner products float64 (n, n) of what n updates change, over all layers; 0 where nothing changes the model.

    `gap` is |mean of B_i A_i - mean of B_i mean of A_i| / |mean of B_i A_i| over all layers, by Frobenius norm; None
    where not both factors train.
    """

    gram: Doubles
    gap: float | None


def geometry(
    tensors: Sequence[TensorSpec],
    trained: frozenset[TensorSpec],
    current: Callable[[TensorSpec], npt.NDArray[np.float32]],
    differences: Differences,
    shares: Doubles,
) -> Geometry:
    """Takes an adapter's `tensors`, those of them that trained, and the updates' `shares` (n,), which weigh the gap.

    Memory is that of two blocks of updates of one layer, `BLOCK_BYTES` each or one update.
    """
    count = len(shares)
    gram = np.zeros((count, count))
    off = whole = 0.0
    pairs = False
    for layer in _layers(tensors):
        moving = [tensor for tensor in layer if tensor in trained]
        if len(layer) == 2 and len(moving) == 2:
            pairs = True
            layer_gram, layer_off, layer_whole = _both_factors(layer, current, differences, shares)
            gram, off, whole = gram + layer_gram, off + layer_off, whole + layer_whole
        for tensor in moving if len(moving) == 1 else ():
            other = next((other for other in layer if other != tensor), None)
            gram += _one_tensor(tensor, other, current, differences, count)
    gap = math.sqrt(max(off, 0.0) / whole) if whole > 0 else 0.0
    return Geometry(gram, gap if pairs else None)


def _layers(tensors: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """LoRA's A and B of a layer, in this order; any other tensor by itself."""
    layers: dict[str, list[TensorSpec]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.role):
        factor = tensor.role in ("lora_A", "lora_B")
        layers.setdefault(tensor.name.replace(f".{tensor.role}.", ".") if factor else tensor.name, []).append(tensor)
    return list(layers.values())


def _blocks(count: int, size: int, rank: int) -> Iterator[tuple[range, range]]:
    """Pairs of blocks of updates with `size` values each, every two updates in one pair."""
    step = max(1, min(BLOCK_BYTES // (8 * size), _MAX_SIDE // rank))
    blocks = [range(start, min(start + step, count)) for start in range(0, count, step)]
    return combinations_with_replacement(blocks, 2)


def _one_tensor(
    tensor: TensorSpec,
    other: TensorSpec | None,
    current: Callable[[TensorSpec], npt.NDArray[np.float32]],
    differences: Differences,
    count: int,
) -> Doubles:
    """Inner products where one tensor trains; `other` is the factor of LoRA that does not."""
    root: Doubles | None = None
    if other is not None:
        # |dB A| = |dB root| with root = (A A^T)^(1/2), and |B dA| = |root dA| with root = (B^T B)^(1/2).
        factor = current(other).astype(np.float64)
        values, vectors = np.linalg.eigh(factor @ factor.T if tensor.role == "lora_B" else factor.T @ factor)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    def load(block: range) -> Doubles:
        rows = np.empty((len(block), math.prod(tensor.shape)))
        for row, index in zip(rows, block, strict=True):
            change = differences(index, tensor).astype(np.float64)
            if root is not None:
                change = change @ root if tensor.role == "lora_B" else root @ change
            row[:] = change.ravel()
        return rows

    gram = np.zeros((count, count))
    loaded: tuple[range, Doubles] | None = None
    for first, second in _blocks(count, math.prod(tensor.shape), 1):
        if loaded is None or loaded[0] != first:
            loaded = first, load(first)
        right = loaded[1] if second == first else load(second)
        part = loaded[1] @ right.T
        gram[first.start : first.stop, second.start : second.stop] = part
        gram[second.start : second.stop, first.start : first.stop] = part.T
    return gram


def _both_factors(
    layer: Sequence[TensorSpec],
    current: Callable[[TensorSpec], npt.NDArray[np.float32]],
    differences: Differences,
    shares: Doubles,
) -> tuple[Doubles, float, float]:
    """Inner products (n, n), the square of |mean of products - product of means|, and that of |mean of products|."""
    first, second = layer
    a, b = current(first).astype(np.float64), current(second).astype(np.float64)
    rank, count = len(a), len(shares)
    aa, bb = a @ a.T, b.T @ b
    mean_a, mean_b = np.zeros_like(a), np.zeros_like(b)
    for index, share in enumerate(shares):
        mean_a += share * differences(index, first)
        mean_b += share * differences(index, second)
    mean_aa, mean_bb = mean_a @ mean_a.T, mean_b.T @ mean_b

    def load(block: range) -> _Factors:
        right = np.empty((len(block), *a.shape))
        left = np.empty((len(block), *b.T.shape))
        for slot, index in enumerate(block):
            right[slot] = differences(index, first)
            left[slot] = differences(index, second).T
        return _Factors(right, left, right @ a.T, left @ b, right @ mean_a.T, left @ mean_b)

    gram, off, along = np.zeros((count, count)), 0.0, np.zeros(count)
    loaded: tuple[range, _Factors] | None = None
    for one, two in _blocks(count, a.size + b.size, rank):
        if loaded is None or loaded[0] != one:
            loaded = one, load(one)
        x = loaded[1]
        y = x if two == one else load(two)
        # (k, l, r, r): dA_i dA_j^T and dB_i^T dB_j.
        outer = _products(x.right, y.right)
        inner = _products(x.left, y.left)
        change = aa + y.right_a.transpose(0, 2, 1)[None] + outer
        part = (
            np.einsum("ijab,ijab->ij", inner, change + x.right_a[:, None])
            + np.einsum("iab,ijab->ij", x.left_b, y.right_a.transpose(0, 2, 1)[None] + outer)
            + np.einsum("jba,ijab->ij", y.left_b, x.right_a[:, None] + outer)
            + np.einsum("ab,ijab->ij", bb, outer)
        )
        gram[one.start : one.stop, two.start : two.stop] = part
        gram[two.start : two.stop, one.start : one.stop] = part.T
        # Centered at the mean, so that equal updates give nothing.
        inner = inner - x.left_mean[:, None] - y.left_mean.transpose(0, 2, 1)[None] + mean_bb
        outer = outer - x.right_mean[:, None] - y.right_mean.transpose(0, 2, 1)[None] + mean_aa
        weights = np.outer(shares[one.start : one.stop], shares[two.start : two.stop])
        off += (1 if one == two else 2) * float((weights * np.einsum("ijab,ijab->ij", inner, outer)).sum())
        if one == two:
            along[one.start : one.stop] = np.einsum("iba,iab->i", x.left_b, aa + x.right_a.transpose(0, 2, 1))
            along[one.start : one.stop] += np.einsum("ab,iba->i", bb, x.right_a)
    whole = float((bb * aa).sum() + 2 * shares @ along + shares @ gram @ shares)
    return gram, off, whole


@dataclass(slots=True)
class _Factors:
    """A block of k updates: dA (k, r, in), dB^T (k, r, out); dA A^T, dB^T B, and both with their means: (k, r, r)."""

    right: Doubles
    left: Doubles
    right_a: Doubles
    left_b: Doubles
    right_mean: Doubles
    left_mean: Doubles


def _products(first: Doubles, second: Doubles) -> Doubles:
    """(k, l, r, r): the products of k matrices (r, m) with the transposes of l others."""
    (k, rank, width), count = first.shape, len(second)
    flat = first.reshape(k * rank, width) @ second.reshape(count * rank, width).T
    return flat.reshape(k, rank, count, rank).transpose(0, 2, 1, 3)
