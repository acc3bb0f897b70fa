"""Decoders of any size with random weights, written tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["SIZES", "Decoder", "write_decoder"]

# Tensors start at multiples of it, so that runtimes can map them.
_PAGE = 4096

# Elements that are made and written at a time.
_PIECE = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder like Llama's, with a head of its own and without a cache.

    Attributes:
        width: Channels of the residual stream.
        inner: Channels of the gated inner layer.
        layers: How many there are.
        heads: Heads of attention.
        groups: Heads of keys and values.
        vocabulary: Rows of the table and of the head.
        half: Whether weights and activations are float16 instead of float32.
        sparse: Whether a tensor holds random values in its first piece only, and a hole behind it.
    """

    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int = 32000
    half: bool = False
    sparse: bool = False

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Shapes of all matrices by name, in the order in which they are used."""
        narrow = self.width // self.heads * self.groups
        found = {"embed": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            found |= {
                f"layers.{layer}.q": (self.width, self.width),
                f"layers.{layer}.k": (self.width, narrow),
                f"layers.{layer}.v": (self.width, narrow),
                f"layers.{layer}.o": (self.width, self.width),
                f"layers.{layer}.gate": (self.width, self.inner),
                f"layers.{layer}.up": (self.width, self.inner),
                f"layers.{layer}.down": (self.inner, self.width),
            }
        return {**found, "head": (self.width, self.vocabulary)}

    @property
    def parameters(self) -> int:
        """Weights of all matrices."""
        return sum(math.prod(shape) for shape in self.weights.values())


# The one of 0.9 GB is a layer of that of 13 GB, with its table and head: memory follows the largest
# tensor and not the number of layers.
SIZES = {
    "0.06": Decoder(512, 1408, 2, 8, 8, vocabulary=8000),
    "0.2": Decoder(1024, 2816, 3, 8, 8, vocabulary=8000),
    "0.9": Decoder(4096, 11008, 1, 32, 32, half=True),
    "1": Decoder(1536, 4096, 5, 12, 12),
    "4": Decoder(2048, 5632, 16, 16, 16),
    "13": Decoder(4096, 11008, 31, 32, 32, half=True),
    "130": Decoder(8192, 28672, 75, 64, 8, half=True, sparse=True),
}


class _Graph:
    """Nodes of a decoder in the making; the float type is that of its weights."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.float = np.float16 if decoder.half else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, op_type: str, *inputs: Any, out: str = "", **attributes: Any) -> str:
        """One node; inputs that are numbers or lists become constants."""
        names = [given if isinstance(given, str) else self._constant(given) for given in inputs]
        output = out or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], output, **attributes))
        return output

    def _constant(self, value: float | list[int]) -> str:
        array = np.asarray(value, self.float if isinstance(value, float) else np.int64)
        name = f"constant_{value}".replace(" ", "")
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def norm(self, x: str) -> str:
        """RMSNorm with a scale of 1."""
        wide = self.add("Cast", x, to=TensorProto.FLOAT) if self.decoder.half else x
        mean = self.add("ReduceMean", self.add("Mul", wide, wide), axes=[-1], keepdims=1)
        small = numpy_helper.from_array(np.array(1e-5, np.float32), "small")
        self.constants["small"] = small
        wide = self.add("Div", wide, self.add("Sqrt", self.add("Add", mean, "small")))
        return self.add("Cast", wide, to=TensorProto.FLOAT16) if self.decoder.half else wide

    def layer(self, x: str, number: int) -> str:
        """Attention and the gated inner layer, each added to the stream."""
        d, p = self.decoder, f"layers.{number}"
        size = d.width // d.heads
        h, parts = self.norm(x), {}
        for name, count in (("q", d.heads), ("k", d.groups), ("v", d.groups)):
            made = self.add("Reshape", self.add("MatMul", h, f"{p}.{name}"), [0, 0, count, size])
            made = self.add("Transpose", made, perm=[0, 2, 1, 3])
            if count < d.heads:  # every group serves several heads
                made = self.add("Unsqueeze", made, [2])
                made = self.add("Tile", made, [1, 1, d.heads // count, 1, 1])
                made = self.add("Reshape", made, [0, d.heads, -1, size])
            parts[name] = made
        scores = self.add(
            "MatMul", parts["q"], self.add("Transpose", parts["k"], perm=[0, 1, 3, 2])
        )
        scores = self.add("Softmax", self.add("Mul", scores, size**-0.5), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", scores, parts["v"]), perm=[0, 2, 1, 3])
        mixed = self.add("Reshape", mixed, [0, 0, d.width])
        x = self.add("Add", x, self.add("MatMul", mixed, f"{p}.o"))
        h = self.norm(x)
        gate = self.add("MatMul", h, f"{p}.gate")
        gate = self.add("Mul", gate, self.add("Sigmoid", gate))
        inner = self.add("Mul", gate, self.add("MatMul", h, f"{p}.up"))
        return self.add("Add", x, self.add("MatMul", inner, f"{p}.down"))


def write_decoder(decoder: Decoder, path: Path) -> int:
    """Write a decoder with its weights in ``<path>.data``, in memory of a few megabytes.

    Returns:
        Bytes of both files.
    """
    graph = _Graph(decoder)
    x = graph.add("Gather", "embed", "input_ids", axis=0)
    for number in range(decoder.layers):
        x = graph.layer(x, number)
    graph.add("MatMul", graph.norm(x), "head", out="logits")
    kind = TensorProto.FLOAT16 if decoder.half else TensorProto.FLOAT
    place = path.with_name(f"{path.name}.data")
    with place.open("wb") as file:
        stored = [*_stored(decoder, file, place.name, kind, graph.float)]
        file.truncate(-(-file.tell() // _PAGE) * _PAGE)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "decoder",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
            [helper.make_tensor_value_info("logits", kind, ["batch", "sequence", "vocabulary"])],
            [*graph.constants.values(), *stored],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path.write_bytes(model.SerializeToString())
    return path.stat().st_size + place.stat().st_size


def _stored(
    decoder: Decoder, file: BinaryIO, location: str, kind: int, dtype: type[np.generic]
) -> Iterator[onnx.TensorProto]:
    """Write the weights one behind the other; the tensors that refer to them."""
    for number, (name, shape) in enumerate(decoder.weights.items()):
        rng = np.random.default_rng([0, number])
        offset, size = -(-file.tell() // _PAGE) * _PAGE, math.prod(shape)
        file.seek(offset)
        deviation = 1.0 if name == "embed" else shape[0] ** -0.5
        for start in range(0, size, _PIECE):
            piece = rng.standard_normal(min(_PIECE, size - start), dtype=np.float32) * deviation
            file.write(piece.astype(dtype).data)
            if decoder.sparse:
                break
        itemsize = np.dtype(dtype).itemsize
        file.seek(offset + size * itemsize)
        tensor = TensorProto(name=name, data_type=kind, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {
            "location": location,
            "offset": offset,
            "length": size * itemsize,
        }.items():
            tensor.external_data.add(key=key, value=str(value))
        yield tensor
