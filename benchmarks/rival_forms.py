"""The rivals of the codes on any tensor: round to nearest, k-quant, HQQ and GPTQ, at 2 to 4 bits.

`Rivals` rounds the tensors that onnxcomp compresses, as the same matrices, convolutions and tables
too, and writes the model with what they decode to. Blocks are 128 weights of a row, or what is left
of it. Bytes are those of the model without these tensors and of their codes, packed, with a float16
scale and a zero point for each block: fewer than operators of ONNX Runtime take, which have no 3
bits and no convolutions. Round to nearest and GPTQ are those of the integer codec, k-quant is ONNX
Runtime's, HQQ is written from the paper (Badri and Shaji, 2023), as ONNX Runtime's needs torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.calibration.statistics import collect
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.integer.grid import Grid, gptq, rounded
from onnxcomp.passes.codecs.moments import damped, with_weight_error
from onnxcomp.passes.ir.model import copy_model, load, output_size, save
from onnxcomp.passes.ir.traversal import find_initializer
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import Stats, WeightSite

__all__ = ["RIVALS", "Rivals", "hqq", "k_quant", "stored_bytes"]

Array = npt.NDArray[Any]
BLOCK = 128

# HQQ as published: the exponent of its loss, and how firmly errors are held to it.
_EXPONENT, _FIRMNESS, _FIRMER, _STEPS = 0.7, 10.0, 1.01, 20

# Weights that are worked on at a time.
_CHUNK = 1 << 22


def _grid(bits: int) -> Grid:
    return Grid(bits, BLOCK, True, np.dtype(np.float16))


def stored_bytes(rows: int, length: int, bits: int, *, real_zeros: bool = False) -> int:
    """Bytes of codes, float16 scales and zero points, which HQQ keeps in float16."""
    blocks = rows * -(-length // BLOCK)
    zeros = 2 * blocks if real_zeros else -(-blocks * bits // 8)
    return -(-rows * length * bits // 8) + 2 * blocks + zeros


def _round(matrix: Array, bits: int) -> Array:
    return rounded(matrix, _grid(bits)).decode(matrix.shape[1])


def _in_blocks(restore: Callable[[Array, int], Array]) -> Callable[[Array, int], Array]:
    """What restores blocks ``(n, width)``, for matrices: rows are cut into blocks."""

    def of_matrix(matrix: Array, bits: int) -> Array:
        found = np.empty(matrix.shape, np.float32)
        rows, whole = len(matrix), matrix.shape[1] // BLOCK * BLOCK
        step = max(1, _CHUNK // matrix.shape[1])
        for start in range(0, rows, step):
            part = slice(start, start + step)
            if whole:
                blocks = np.ascontiguousarray(matrix[part, :whole]).reshape(-1, BLOCK)
                found[part, :whole] = restore(blocks, bits).reshape(-1, whole)
            if whole < matrix.shape[1]:
                found[part, whole:] = restore(np.ascontiguousarray(matrix[part, whole:]), bits)
        return found

    return of_matrix


@_in_blocks
def k_quant(blocks: Array, bits: int) -> Array:
    """ONNX Runtime's k-quant, restored with float16 scales; blocks of one value keep it."""
    from onnxruntime.quantization.neural_compressor import weight_only

    values = blocks.astype(np.float32)
    even = values.min(axis=1, keepdims=True) == values.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # of blocks of one value
        codes, scales, zeros = weight_only.quant_tensor_k_quant_cpu(values, bits, values.shape[1])
        found = (codes - zeros.astype(np.float64)) * scales.astype(np.float16)
    return np.where(even, values, found).astype(np.float32)


@_in_blocks
def hqq(blocks: Array, bits: int) -> Array:
    """Half-quadratic quantisation: zero points at which few errors are large.

    Errors are split into a few large ones, by the proximal step of the l_p norm, and the rest,
    whose squares the zero point makes least. Ends when the mean error rises.
    """
    values, top = blocks.astype(np.float32), float(2**bits - 1)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    scale = np.where(high > low, (high - low) / top, 1.0).astype(np.float16).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1.0), scale)
    zero = np.rint(-low / scale)
    firmness, least, best = _FIRMNESS, np.inf, zero
    for _ in range(_STEPS):
        codes = np.clip(np.rint(values / scale + zero), 0, top)
        error = values - (codes - zero) * scale
        mean = float(np.abs(error).mean())
        if mean >= least:
            break
        least, best, size = mean, zero, np.abs(error)
        shrunk = np.maximum(size - (size + 1e-8) ** (_EXPONENT - 1) / firmness, 0.0)
        large = np.sign(error) * shrunk
        zero = np.mean(codes - (values - large) / scale, axis=1, keepdims=True)
        firmness *= _FIRMER
    zero = best.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(values / scale + zero), 0, top)
    return np.asarray((codes - zero) * scale, np.float32)


def _gptq(matrix: Array, bits: int, stats: Stats) -> Array:
    """GPTQ of a matrix; of a grouped convolution, of each group for its own inputs.

    Rows that are looked up as well count a little for themselves, as for the codes.
    """
    grams = stats.gram if stats.gram.ndim == 3 else stats.gram[None]
    if len(grams) == 0 or len(matrix) % len(grams) or grams.shape[-1] != matrix.shape[1]:
        return _round(matrix, bits)
    found = []
    for part, gram in zip(np.split(matrix, len(grams)), grams, strict=True):
        moments = damped(dataclasses.replace(stats, gram=gram))
        if stats.frequencies is not None:
            moments = with_weight_error(moments, part)
        found.append(gptq(part, _grid(bits), moments).decode(part.shape[1]))
    return np.concatenate(found)


# By name; what has no function takes inputs.
RIVALS: Mapping[str, Callable[[Array, int], Array] | None] = {
    "RTN": _round,
    "k-quant": k_quant,
    "HQQ": hqq,
    "GPTQ": None,
}


class Rivals:
    """Rounds the tensors of a model that codes would be found for.

    Args:
        path: The dense model.
        feeds: Inputs that GPTQ calibrates with; they run through the dense model.
    """

    def __init__(self, path: Path, feeds: Sequence[dict[str, Array]]) -> None:
        self._model, self._feeds = load(path), feeds
        canonicalize(self._model)
        found = find_sites(self._model).sites
        self._sites = [site for site in found if CODECS["hyper"].refuse(site) is None]
        self._calibrated: dict[int, dict[str, Array]] = {}
        self._seconds = 0.0

    def write(self, name: str, bits: int, path: Path) -> tuple[int, float]:
        """Write the model as a rival at so many bits leaves it.

        Returns:
            Bytes with packed codes, and CPU seconds.
        """
        if name == "GPTQ" and not self._calibrated.get(bits):
            self._calibrate()
        start, model = time.process_time(), copy_model(self._model)
        size = output_size(model, name=path.name)
        for site in self._sites:
            stored = find_initializer(model, site.name)
            assert stored is not None and stored.const_value is not None
            found = site.stored_form(self._restored(name, bits, site).astype(np.float32))
            dtype = stored.const_value.dtype
            stored.const_value = ir.tensor(found.astype(dtype.numpy()), dtype, site.name)
            extent = (site.rows, site.length)
            size += stored_bytes(*extent, bits, real_zeros=name == "HQQ") - site.nbytes
        seconds = time.process_time() - start
        save(model, path)
        return size, seconds + (self._seconds if name == "GPTQ" else 0.0)

    def _restored(self, name: str, bits: int, site: WeightSite) -> Array:
        restore = RIVALS[name]
        if restore is not None:
            return restore(read_weight(self._model, site), bits)
        found = self._calibrated[bits].pop(site.name, None)
        return _round(read_weight(self._model, site), bits) if found is None else found

    def _calibrate(self) -> None:
        """GPTQ at all bits, in one run of the inputs."""
        start = time.process_time()
        self._calibrated = {4: {}, 3: {}, 2: {}}
        for stats in collect(self._model, self._feeds, self._sites):
            matrix = read_weight(self._model, stats.site)
            for bits, found in self._calibrated.items():
                found[stats.site.name] = _gptq(matrix, bits, stats).astype(np.float16)
        self._seconds = (time.process_time() - start) / len(self._calibrated)
