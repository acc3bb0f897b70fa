"""Write a weight that is looked up in a vector by runs of consecutive entries.

A run is stored by its start, or by where it begins and how far it jumps; a sign by a bit. What
comes out are standard operators on constants, which a session folds when it starts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.ir.traversal import Names, new_initializer

__all__ = ["IndexedWeight", "RunWriter"]

Array = npt.NDArray[Any]

# Cuts with more pieces than this are stored as tables of runs.
_MOST_SLICES = 64

# The first opset with CumSum and ScatterElements, which runs of any length need.
_SUMS = 11


@dataclasses.dataclass(frozen=True, slots=True)
class IndexedWeight:
    """A weight as it is looked up.

    Attributes:
        name: What its nodes and tensors are called after.
        memory: The shared array, a vector.
        index: Entry of each weight, int64, in the weight's shape.
        negative: Where its sign is a minus; None for no signs.
        factors: Numbers it is multiplied by after that, one by one.
    """

    name: str
    memory: ir.Value
    index: Array
    negative: Array | None = None
    factors: tuple[np.float32, ...] = ()


def _runs(index: Array) -> Array:
    """Where runs of consecutive entries begin in a flat index."""
    return np.concatenate([[0], np.flatnonzero(np.diff(index) != 1) + 1])


def _best_order(index: Array) -> tuple[tuple[int, ...], Array]:
    """The order of axes in which a table has the fewest runs, and the table in it, flat."""
    orders = [tuple(range(index.ndim))]
    if index.ndim == 2:
        orders.append((1, 0))
    flat = [index.transpose(order).reshape(-1) for order in orders]
    best = min(range(len(orders)), key=lambda i: len(_runs(flat[i])))
    return orders[best], flat[best]


def _least(values: Array) -> Array:
    """The same integers in the smallest type that holds them."""
    for dtype in (np.uint8, np.uint16):
        if values.min() >= 0 and values.max() <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values.astype(np.int32)


class _Form:
    """How an index can be stored, and which way takes the fewest bytes."""

    def __init__(self, index: Array, opset: int) -> None:
        self.order, self.flat = _best_order(index)
        self.starts = _runs(self.flat)
        ends = [len(self.flat)]
        self.step = int(np.gcd.reduce(np.concatenate([self.starts[1:], ends])))
        self.heads = _least(self.flat[:: self.step])
        sizes = {"equal": self.heads.nbytes}
        if len(self.starts) <= _MOST_SLICES:
            sizes["slices"] = 16 * len(self.starts)
        if opset >= _SUMS:
            sizes["sums"] = 8 * len(self.starts)
        # Slices need no table of the weight's size when the session starts.
        self.kind = "slices" if "slices" in sizes else min(sizes, key=lambda kind: sizes[kind])
        self.nbytes = sizes[self.kind]


class RunWriter:
    """Writes weights in their new form."""

    def __init__(self, model: ir.Model, opset: int) -> None:
        self._model = model
        self._opset = opset
        self._names = Names(model)
        self._anchor: ir.Node | None = None
        self._label = ""

    def nbytes(self, weight: IndexedWeight) -> int:
        """What index and signs take."""
        signs = 0 if weight.negative is None else -(-weight.index.size // 8)
        return _Form(weight.index, self._opset).nbytes + signs

    def write(self, weight: IndexedWeight, anchor: ir.Node) -> ir.Value:
        """The weight, made by nodes before `anchor`."""
        form = _Form(weight.index, self._opset)
        self._anchor, self._label = anchor, weight.name
        write = {"slices": self._slices, "equal": self._gather, "sums": self._summed}[form.kind]
        made = write(weight.memory, form)
        if weight.negative is not None:
            made = self._signed(made, weight.negative.transpose(form.order).reshape(-1))
        for factor in weight.factors:
            made = self._node("Mul", made, self._tensor("scale", np.array(factor, np.float32)))
        shape = weight.index.transpose(form.order).shape
        made = self._node("Reshape", made, self._tensor("shape", np.array(shape, np.int64)))
        if form.order != tuple(range(len(form.order))):
            made = self._node("Transpose", made, perm=ir.AttrInt64s("perm", list(form.order)))
        return made

    def _slices(self, memory: ir.Value, form: _Form) -> ir.Value:
        """Pieces of the memory, one behind the other."""
        flat, starts = form.flat, form.starts
        ends = np.concatenate([starts[1:], [len(flat)]])
        pieces = []
        for begin, end in zip(starts, ends, strict=True):
            bounds = [int(flat[begin]), int(flat[begin]) + int(end - begin)]
            if self._opset >= 10:
                given = [self._tensor("bound", np.array([bound], np.int64)) for bound in bounds]
                pieces.append(self._node("Slice", memory, *given))
            else:
                pieces.append(
                    self._node(
                        "Slice",
                        memory,
                        starts=ir.AttrInt64s("starts", bounds[:1]),
                        ends=ir.AttrInt64s("ends", bounds[1:]),
                    )
                )
        if len(pieces) == 1:
            return pieces[0]
        return self._node("Concat", *pieces, axis=ir.AttrInt64("axis", 0))

    def _gather(self, memory: ir.Value, form: _Form) -> ir.Value:
        """Runs of one length, by their starts."""
        index = self._tensor("starts", form.heads[:, None])
        if form.heads.dtype != np.int32:
            index = self._node("Cast", index, to=ir.AttrInt64("to", int(ir.DataType.INT32)))
        if form.step > 1:
            places = self._tensor("places", np.arange(form.step, dtype=np.int32)[None])
            index = self._node("Add", index, places)
        rows = self._node("Gather", memory, index, axis=ir.AttrInt64("axis", 0))
        return self._node("Reshape", rows, self._tensor("flat", np.array([-1], np.int64)))

    def _summed(self, memory: ir.Value, form: _Form) -> ir.Value:
        """Runs of any length: steps of one, but for where a run begins, added up."""
        size = self._tensor("size", np.array([len(form.flat)], np.int64))
        one = ir.AttrTensor("value", ir.Tensor(np.ones(1, np.int32)))
        steps = self._node("ConstantOfShape", size, value=one)
        jumps = np.diff(form.flat, prepend=0)[form.starts].astype(np.int32)
        steps = self._node(
            "ScatterElements",
            steps,
            self._tensor("begins", form.starts.astype(np.int32)),
            self._tensor("jumps", jumps),
            axis=ir.AttrInt64("axis", 0),
        )
        index = self._node("CumSum", steps, self._tensor("axis", np.array(0, np.int64)))
        return self._node("Gather", memory, index, axis=ir.AttrInt64("axis", 0))

    def _signed(self, value: ir.Value, negative: Array) -> ir.Value:
        """Times -1 where a bit is set; eight bits a byte, the lowest first."""
        packed = np.packbits(negative, bitorder="little")[:, None]
        octets = self._tensor("signs", packed)
        octets = self._node("Cast", octets, to=ir.AttrInt64("to", int(ir.DataType.INT32)))
        powers = self._tensor("powers", (1 << np.arange(8, dtype=np.int32))[None])
        two = self._tensor("two", np.array(2, np.int32))
        shifted = self._node("Div", octets, powers)
        rest = self._node("Mul", self._node("Div", shifted, two), two)
        bits = self._node("Sub", shifted, rest)
        twice = self._node("Mul", bits, two)
        one = self._tensor("one", np.array(1, np.int32))
        signs = self._node("Sub", one, twice)
        signs = self._node("Cast", signs, to=ir.AttrInt64("to", int(ir.DataType.FLOAT)))
        flat = self._node("Reshape", signs, self._tensor("flat", np.array([-1], np.int64)))
        if negative.size % 8:
            flat = self._cut(flat, negative.size)
        return self._node("Mul", value, flat)

    def _cut(self, value: ir.Value, size: int) -> ir.Value:
        if self._opset >= 10:
            bounds = [self._tensor("bound", np.array([b], np.int64)) for b in (0, size)]
            return self._node("Slice", value, *bounds)
        return self._node(
            "Slice",
            value,
            starts=ir.AttrInt64s("starts", [0]),
            ends=ir.AttrInt64s("ends", [size]),
        )

    def _node(self, op_type: str, *inputs: ir.Value, **attributes: ir.Attr) -> ir.Value:
        name = self._names.node(f"{self._label}/{op_type}")
        node = ir.Node("", op_type, inputs, list(attributes.values()), name=name)
        node.outputs[0].name = self._names.value(name)
        assert self._anchor is not None and self._anchor.graph is not None
        self._anchor.graph.insert_before(self._anchor, node)
        return node.outputs[0]

    def _tensor(self, role: str, array: Array) -> ir.Value:
        name = self._names.value(f"{self._label}::{role}")
        return new_initializer(self._model, name, np.ascontiguousarray(array).reshape(array.shape))
