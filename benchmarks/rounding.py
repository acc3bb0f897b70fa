"""Ways to round weights to few bits that the hyper codec is compared with, in plain numpy.

Each takes weights ``(rows, length)``, and returns them as they are restored, with the bits per
weight that are stored. Groups are runs of 128 weights of a row with one float16 scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["clipped", "lloyd_max", "nf4", "rounded"]

Array = npt.NDArray[Any]
GROUP = 128

# Levels of the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _in_groups(weight: Array, group: int, restore: Callable[[Array], Array]) -> Array:
    flat = weight.astype(np.float64).reshape(-1, group)
    return restore(flat).reshape(weight.shape)


def rounded(weight: Array, bits: int, grid: str) -> tuple[Array, float]:
    """Round to nearest on a grid from the range of each group.

    Args:
        weight: The weights.
        bits: Bits per weight.
        grid: "even" for levels -n .. n; "symmetric" for -n-1 .. n with the extreme of the group,
            of whatever sign, at -n-1, as ONNX Runtime does; "asymmetric" for a zero point.
    """
    top = 2**bits - 1

    def restore(flat: Array) -> Array:
        if grid == "even":
            scale = np.abs(flat).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
            scale = scale.astype(np.float16).astype(np.float64)
            return np.rint(flat / scale) * scale
        if grid == "symmetric":
            extreme = np.take_along_axis(flat, np.abs(flat).argmax(1)[:, None], 1)
            scale, zero = extreme / -(2 ** (bits - 1)), 2 ** (bits - 1)
        else:
            low = np.minimum(flat.min(1, keepdims=True), 0.0)
            scale = (np.maximum(flat.max(1, keepdims=True), 0.0) - low) / top
            zero = np.rint(-low / scale)
        scale = scale.astype(np.float16).astype(np.float64)
        return (np.clip(np.rint(flat / scale) + zero, 0, top) - zero) * scale

    side = 16 + bits * (grid == "asymmetric")
    return _in_groups(weight, GROUP, restore), bits + side / GROUP


def clipped(weight: Array, bits: int) -> tuple[Array, float]:
    """Symmetric rounding, with the best of 30 clipping ranges for each group."""
    half = 2 ** (bits - 1)

    def restore(flat: Array) -> Array:
        best, least = flat * 0, np.full(len(flat), np.inf)
        extreme = np.take_along_axis(flat, np.abs(flat).argmax(1)[:, None], 1)
        for share in np.linspace(0.3, 1.0, 30):
            scale = (extreme * share / -half).astype(np.float16).astype(np.float64)
            found = np.clip(np.rint(flat / scale), -half, half - 1) * scale
            error = np.square(found - flat).sum(1)
            better = error < least
            best[better], least[better] = found[better], error[better]
        return best

    return _in_groups(weight, GROUP, restore), bits + 16 / GROUP


def nf4(weight: Array, group: int = 64) -> tuple[Array, float]:
    """NormalFloat: 16 quantiles of the normal distribution, scaled by each group's maximum."""
    levels = np.array(NF4)
    middles = (levels[1:] + levels[:-1]) / 2

    def restore(flat: Array) -> Array:
        scale = np.abs(flat).max(1, keepdims=True).astype(np.float16).astype(np.float64)
        return levels[np.searchsorted(middles, flat / scale)] * scale

    return _in_groups(weight, group, restore), 4 + 16 / group


def lloyd_max(weight: Array, bits: int, rounds: int = 100) -> tuple[Array, float]:
    """The best scalar quantiser of all weights together (Lloyd, 1957; Max, 1960)."""
    values = np.sort(weight.astype(np.float64).reshape(-1))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    levels = np.quantile(values, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(rounds):
        cuts = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], cuts, [len(values)]])
        counts = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(counts, 1)
        levels = np.where(counts > 0, means, levels)
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[np.searchsorted(middles, weight)], bits + 2**bits * 32 / weight.size
