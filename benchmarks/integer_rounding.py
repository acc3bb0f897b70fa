"""The integer rivals: ONNX Runtime's MatMulNBits by rounding, and by GPTQ, in real files.

`round_model` runs ONNX Runtime's own quantisers (block 128, float32 scales): round to nearest, HQQ,
and k-quant. Its GPTQ needs a package of its own: `gptq_model` puts codes found by the GPTQ of the
integer codec (damping 0.01) into the same file, for 4 and 2 bits. ONNX Runtime has no look-up in
2-bit tables, so in all models tables of Gather are rounded in place and counted as if they were
stored like the other weights.
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

from onnxcomp.passes.codecs.integer.grid import Grid, gptq, rounded
from onnxcomp.passes.codecs.moments import damped
from onnxcomp.passes.weight import Stats

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


def _grid(bits: int, symmetric: bool) -> Grid:
    return Grid(bits, BLOCK, not symmetric, np.dtype(np.float32))


def _with_rounded_tables(model: Path, bits: int, symmetric: bool) -> tuple[onnx.ModelProto, int]:
    """The model with rounded tables, and the bytes that storing them as codes would save."""
    proto = onnx.load(model)
    names, saved = table_names(model), 0
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            table = onnx.numpy_helper.to_array(tensor)
            new = rounded(table, _grid(bits, symmetric)).decode(table.shape[1])
            tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))
            saved += table.nbytes - stored_bytes(*table.shape, bits, symmetric)
    return proto, saved


def _algorithm(name: str, bits: int, symmetric: bool) -> Any:
    """Settings of one of ONNX Runtime's quantisers."""
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    if name == "hqq":  # runs on torch
        return quantizer.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=bits)
    if name == "k_quant":
        return quantizer.KQuantWeightOnlyQuantConfig()
    return quantizer.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=symmetric, bits=bits
    )


def round_model(
    model: Path, output: Path, bits: int, *, symmetric: bool, algorithm: str = "default"
) -> int:
    """Write the model with MatMulNBits by one of ONNX Runtime's quantisers.

    Args:
        model: The dense model.
        output: The file.
        bits: 2, 4 or 8.
        symmetric: Without zero points.
        algorithm: "default" rounds to nearest; "hqq"; "k_quant".

    Returns:
        Bytes of the file, tables counted as codes.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    proto, saved = _with_rounded_tables(model, bits, symmetric)
    config = _algorithm(algorithm, bits, symmetric)
    quantizer = MatMulNBitsQuantizer(proto, bits=bits, algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output), use_external_data_format=False)
    return output.stat().st_size - saved


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
        found = gptq(weight, _grid(bits, symmetric=False), damped(stats[name]))
        content = _packed(found.codes, bits), found.scales, _packed(found.zeros, bits)
        for input_name, array in zip(node.input[1:4], content, strict=True):
            old = onnx.numpy_helper.to_array(tensors[input_name])
            new = array.reshape(old.shape).astype(old.dtype)
            tensors[input_name].CopyFrom(onnx.numpy_helper.from_array(new, input_name))
        replaced += 1
    if replaced == 0:
        raise SystemExit(f"{output}: no MatMulNBits node has statistics")
    onnx.save(proto, output)
    return size
