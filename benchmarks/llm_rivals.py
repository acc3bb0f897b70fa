"""Write the language model as ONNX Runtime's own tools make it smaller.

    python benchmarks/llm_rivals.py MODEL.onnx OUT.onnx KIND [--calibration tokens.npy]

`KIND` is a key of `KINDS`. Needs onnxruntime; HQQ needs torch as well. "all" in a kind: the table
and the tied head are rounded, too, each in a copy of its own, since no operator of ONNX Runtime
multiplies by the transpose of a rounded table.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

KINDS = {
    "fp16": {},
    "rtn4_128": {"bits": 4, "block_size": 128, "is_symmetric": True},
    "rtn4_32": {"bits": 4, "block_size": 32, "is_symmetric": False},
    "rtn4_32_all": {"bits": 4, "block_size": 32, "is_symmetric": False},
    "rtn8_32": {"bits": 8, "block_size": 32, "is_symmetric": False},
    "gptq4_32": {"bits": 4, "block_size": 32, "is_symmetric": False},
    "kquant4_32": {"bits": 4, "block_size": 32, "is_symmetric": False},
    "hqq4_32": {"bits": 4, "block_size": 32, "is_symmetric": False},
}
TABLE, HEAD = "model.embed_tokens.weight", "head.weight"


class Reader:
    """Calibration inputs, one window at a time, as ONNX Runtime's tools read and copy them."""

    def __init__(self, windows: Any, model: onnx.ModelProto) -> None:
        caches = [value for value in model.graph.input if value.name.startswith("past")]
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in caches}
        self._empty = {
            name: np.zeros((1, heads, 0, size), np.float32)
            for name, (_, heads, _, size) in shapes.items()
        }
        self._windows, self._next = windows, 0

    def rewind(self) -> None:
        """Begin again."""
        self._next = 0

    def get_next(self) -> dict[str, Any] | None:
        """The next window; None after the last one."""
        if self._next == len(self._windows):
            return None
        ids = self._windows[self._next][None]
        self._next += 1
        places = np.arange(ids.shape[1])[None]
        words = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places}
        return {**words, **self._empty}


def untie_head(model: onnx.ModelProto) -> None:
    """``MatMul(x, Transpose(table)) -> MatMul(x, head)``, the head a weight of its own."""
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == TABLE)
    (turned,) = (node for node in model.graph.node if list(node.input) == [TABLE])
    values = np.ascontiguousarray(onnx.numpy_helper.to_array(table).T)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, HEAD))
    for node in model.graph.node:
        node.input[:] = [HEAD if name == turned.output[0] else name for name in node.input]
    model.graph.node.remove(turned)


def quantized(model: onnx.ModelProto, kind: str, windows: Any) -> Any:
    """The model by one of ONNX Runtime's algorithms."""
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    logging.getLogger(tools.__name__).setLevel(logging.ERROR)
    settings: dict[str, Any] = dict(KINDS[kind])
    name = kind.split("_")[0].rstrip("48")
    if name == "gptq":
        reader = Reader(windows, model)
        block = settings["block_size"]
        settings["algo_config"] = tools.GPTQWeightOnlyQuantConfig(reader, block_size=block)
    elif name == "kquant":
        settings["algo_config"] = tools.KQuantWeightOnlyQuantConfig()
    elif name == "hqq":
        settings["algo_config"] = tools.HQQWeightOnlyQuantConfig(block_size=32, bits=4)
    if kind.endswith("_all"):
        untie_head(model)
        settings["op_types_to_quantize"] = ("MatMul", "Gather")
        # Other look-ups, such as those of sizes, hold no weights.
        settings["nodes_to_exclude"] = [
            n.name for n in model.graph.node if n.op_type == "Gather" and n.input[0] != TABLE
        ]
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    quantizer = tools.MatMulNBitsQuantizer(model, accuracy_level=4, **settings)
    quantizer.process()
    for opset in quantizer.model.model.opset_import:  # raised without changing any node for it
        opset.version = opsets.get(opset.domain, opset.version)
    return quantizer.model.model


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--calibration", type=Path)
    given = parser.parse_args()
    model = onnx.load(given.model)
    windows = None if given.calibration is None else np.load(given.calibration)
    if given.kind == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        made = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    else:
        made = quantized(model, given.kind, windows)
    onnx.save(
        made, given.output, save_as_external_data=True, location=f"{given.output.name}.data",
        size_threshold=1024,
    )  # fmt: skip


if __name__ == "__main__":
    main()
