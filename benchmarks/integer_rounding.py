"""The integer rivals: ONNX Runtime's MatMulNBits by rounding, and by GPTQ, in real files.

`round_model` runs ONNX Runtime's own quantiser (block 128, float32 scales). `gptq_model` puts codes
found by GPTQ (Frantar et al., arXiv 2210.17323; no reordering, damping 0.01, scales from the range
of each updated block) into the same file: own numpy code, so that 2 bits are covered too. ONNX
Runtime has no look-up in 2-bit tables, so in all models tables of Gather are rounded in place and
counted as if they were stored like the other weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper

from onnxcomp.passes.codecs.codec import Stats
from onnxcomp.passes.codecs.moments import damped

__all__ = ["gptq_model", "round_model", "stored_bytes", "table_names"]

Array = npt.NDArray[Any]
BLOCK = 128
LEAST_BYTES = 16384


def table_names(model: Path) -> list[str]:
    """Initializers of 16 KiB or more that Gather looks rows up in."""
    graph = onnx.load(model).graph
    sizes = {t.name: math.prod(t.dims) * 4 for t in graph.initializer if t.data_type == 1}
    names = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    return sorted(name for name in names if sizes.get(name, 0) >= LEAST_BYTES)


def stored_bytes(rows: int, length: int, bits: int, symmetric: bool) -> int:
    """Bytes of codes, float32 scales and packed zero points of a table."""
    blocks = -(-length // BLOCK)
    zeros = 0 if symmetric else rows * -(-blocks * bits // 8)
    return rows * blocks * (BLOCK * bits // 8 + 4) + zeros


def _grid(block: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Scales and zero points ``(rows, 1)`` of a block ``(rows, width)``."""
    top = 2**bits - 1
    low = np.minimum(block.min(axis=1, keepdims=True), 0.0)
    high = np.maximum(block.max(axis=1, keepdims=True), 0.0)
    if symmetric:
        extreme = np.where(high > -low, high, low)
        scale = extreme / -(2 ** (bits - 1))
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / top
        zero = np.rint(np.divide(-low, scale, out=np.zeros_like(low), where=scale != 0))
    return np.where(scale == 0, 1.0, scale), np.clip(zero, 0, top)


def _codes(values: Array, scale: Array, zero: Array, bits: int) -> Array:
    return np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)


def rounded(table: Array, bits: int, symmetric: bool) -> Array:
    """A table ``(rows, length)`` after rounding in blocks of its rows."""
    result = np.empty_like(table)
    for start in range(0, table.shape[1], BLOCK):
        part = table[:, start : start + BLOCK].astype(np.float64)
        scale, zero = _grid(part, bits, symmetric)
        result[:, start : start + BLOCK] = (_codes(part, scale, zero, bits) - zero) * scale
    return result


def _with_rounded_tables(model: Path, bits: int, symmetric: bool) -> tuple[onnx.ModelProto, int]:
    """The model with rounded tables, and the bytes that storing them as codes would save."""
    proto = onnx.load(model)
    names, saved = table_names(model), 0
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            table = onnx.numpy_helper.to_array(tensor)
            new = rounded(table, bits, symmetric).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))
            saved += table.nbytes - stored_bytes(*table.shape, bits, symmetric)
    return proto, saved


def round_model(model: Path, output: Path, bits: int, *, symmetric: bool) -> int:
    """Write the model with MatMulNBits rounded to nearest.

    Returns:
        Bytes of the file, tables counted as codes.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    proto, saved = _with_rounded_tables(model, bits, symmetric)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=symmetric, bits=bits)
    quantizer = MatMulNBitsQuantizer(proto, bits=bits, algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output), use_external_data_format=False)
    return output.stat().st_size - saved


def _gptq(weight: Array, stats: Stats, bits: int) -> tuple[Array, Array, Array]:
    """Codes ``(rows, length)``, scales and zero points ``(rows, blocks)`` of a weight."""
    moments = damped(stats)
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    left = weight.astype(np.float64).copy()
    codes, scales, zeros = np.zeros_like(left), [], []
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        scale, zero = _grid(left[:, start:stop], bits, symmetric=False)
        scale = scale.astype(np.float32).astype(np.float64)
        errors = np.empty((len(left), stop - start))
        for column in range(start, stop):
            value = left[:, column : column + 1]
            code = _codes(value, scale, zero, bits)
            codes[:, column : column + 1] = code
            error = (value - (code - zero) * scale) / upper[column, column]
            left[:, column + 1 : stop] -= error * upper[column, column + 1 : stop]
            errors[:, column - start] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
        scales.append(scale[:, 0])
        zeros.append(zero[:, 0])
    return codes, np.stack(scales, 1), np.stack(zeros, 1)


def _packed(codes: Array, bits: int) -> Array:
    """Codes along the last axis in bytes, first code in the low bits."""
    per_byte = 8 // bits
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)]
    split = np.pad(codes, padding).astype(np.uint8)
    split = split.reshape(*codes.shape[:-1], -1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    return np.bitwise_or.reduce(split << shifts, axis=-1).astype(np.uint8)


def gptq_model(model: Path, output: Path, bits: int, stats: Mapping[str, Stats]) -> int:
    """Write the model with MatMulNBits whose codes GPTQ has found.

    Args:
        model: The dense model.
        output: The file.
        bits: 2 or 4.
        stats: Second moments by name of the MatMul node.

    Returns:
        Bytes of the file, tables counted as codes.
    """
    size = round_model(model, output, bits, symmetric=False)
    proto, dense = onnx.load(output), onnx.load(model)
    weights = {tensor.name: tensor for tensor in dense.graph.initializer}
    sources = {node.name: node.input[1] for node in dense.graph.node if node.op_type == "MatMul"}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    replaced = 0
    for node in proto.graph.node:
        name = node.name.removesuffix(f"_Q{bits}")
        if node.op_type != "MatMulNBits" or name not in stats:
            continue
        weight = onnx.numpy_helper.to_array(weights[sources[name]]).T
        codes, scales, zeros = _gptq(weight, stats[name], bits)
        padded = np.pad(codes, [(0, 0), (0, -codes.shape[1] % BLOCK)])
        content = (
            _packed(padded.reshape(len(codes), -1, BLOCK), bits),
            scales.astype(np.float32),
            _packed(zeros, bits),
        )
        for input_name, array in zip(node.input[1:4], content, strict=True):
            old = onnx.numpy_helper.to_array(tensors[input_name])
            new = array.reshape(old.shape).astype(old.dtype)
            tensors[input_name].CopyFrom(onnx.numpy_helper.from_array(new, input_name))
        replaced += 1
    if replaced == 0:
        raise SystemExit(f"{output}: no MatMulNBits node has statistics")
    onnx.save(proto, output)
    return size
