"""FlexLoRA's rule without dense matrices: the best approximation of the mean of B A (Bai et al. 2024, Sec. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhds.spec import SvdSpec
from fedhds.tensors.manifest import TensorSpec
from fedhds_server.aggregation.base import Aggregator, FloatArray, Shares
from fedhds_server.optimizers.base import rounded

Doubles = npt.NDArray[np.float64]


class Svd(Aggregator):
    """The truncated SVD of the mean of the products, at the adapter's rank.

    The mean is the product of the sites' factors side by side: all B times their shares, (out, n rank), by all A,
    (n rank, in). It has the singular values of the two QR's R factors' product, (n rank, n rank). So memory is that of
    one layer's factors of all sites. LoRA's scale is one factor of all products, and changes nothing here.
    """

    description = "SVD: the best approximation, at the adapter's rank, of the mean of LoRA's products B A"

    def groups(self, tensors: Sequence[TensorSpec]) -> list[Sequence[TensorSpec]]:
        """Pairs of A and B."""
        pairs: dict[str, list[TensorSpec]] = {}
        for tensor in sorted(tensors, key=lambda tensor: tensor.role):
            pairs.setdefault(tensor.name.replace(f".{tensor.role}.", "."), []).append(tensor)
        # The pipeline meets a group at its first tensor, which A is by name.
        return list(pairs.values())

    def combine(
        self,
        parameters: SvdSpec,
        group: Sequence[TensorSpec],
        current: Sequence[FloatArray],
        shares: Shares,
        update: Callable[[int], Sequence[FloatArray]],
    ) -> Sequence[FloatArray]:
        first_a, first_b = current
        rank = len(first_a)
        left = np.empty((len(first_b), rank * len(shares)))
        right = np.empty((rank * len(shares), first_a.shape[1]))
        for index, share in enumerate(shares):
            columns = slice(index * rank, (index + 1) * rank)
            right[columns], left[:, columns] = update(index)
            left[:, columns] *= share
        b, values, a = _svd(left, right, rank)
        # Below this, a singular value is what rounding leaves of zero.
        used = values > values[0] * max(left.shape + right.shape) * np.finfo(np.float64).eps
        if not used.any():
            return first_a, np.zeros_like(first_b)
        b *= np.sqrt(np.where(used, values, 0))
        # A direction that no update uses stays trainable: B is zero and A is not, as in a new adapter.
        a *= np.sqrt(np.where(used, values, values[0]))[:, None]
        new_a, new_b = np.zeros_like(first_a), np.zeros_like(first_b)
        new_a[: len(a)], new_b[:, : len(a)] = rounded(a), rounded(b)
        return new_a, new_b


def _svd(left: Doubles, right: Doubles, rank: int) -> tuple[Doubles, Doubles, Doubles]:
    """Left vectors (out, k), singular values (k,) and right vectors (k, in) of left @ right; k is at most `rank`.

    The largest value of each right vector is positive, so that signs do not depend on the LAPACK at hand.
    """
    left_q, left_r = np.linalg.qr(left)
    right_q, right_r = np.linalg.qr(right.T)
    u, values, vt = np.linalg.svd(left_r @ right_r.T)
    b, a = left_q @ u[:, :rank], vt[:rank] @ right_q.T
    count = min(len(values), rank)
    b, a = b[:, :count], a[:count]
    signs: Any = np.where(a[np.arange(count), np.abs(a).argmax(axis=1)] < 0, -1.0, 1.0)
    return b * signs, values[:count], a * signs[:, None]
