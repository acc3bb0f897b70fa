"""Bodies of products: of one whose weight is most of a model, some rows of it after the others.

ONNX Runtime copies every result of folding, and frees it only when a pass over the model is over.
The parts of this body wait for each other, so that it folds each in a pass of its own; what the
first needed serves the next. Values are those of `bodies`, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.hyper import bodies, byte_bodies, pair_bodies
from onnxcomp.passes.codecs.hyper.format import NODE_INPUTS

__all__ = ["MINIMUM_OPSET", "matmul"]

# Concat takes the last axis by -1, and Slice takes ends that are computed.
MINIMUM_OPSET = 11

_FLOAT = int(TensorProto.FLOAT)
_INT32 = int(TensorProto.INT32)

# Name of the bytes -> name of the groups of N rows without their scales.
_Decode = Callable[[str], str]

# Where the axes of codes go, and which entries of `blocks` are the shape of the bytes then.
_ROWS = [0, 3, 1, 2, 4], (0, 1, 2)  # (N, G, B)
_COLUMNS = [1, 2, 4, 0, 3], (1, 2, 0)  # (G, B, N)


@functools.cache
def matmul(
    opset: int, count: int, *, by_byte: bool, padded: bool, pairs: tuple[int, int] | None = None
) -> onnx.FunctionProto:
    """HyperMatMul: x (..., length) -> (..., rows), as products with parts of the rows.

    Args:
        opset: Version of the default domain in the model, at least `MINIMUM_OPSET`.
        count: Parts; weights have as many panels at least.
        by_byte: Whether all weights have `byte_bodies.BITS` bits.
        padded: Whether the length of a weight is padded. Cutting takes a copy.
        pairs: Bits of all weights, and of their states, where `pair_bodies` suits them.
    """
    body = Body(opset)
    x = body.cast("x", _FLOAT)
    axes, sizes = _COLUMNS if pairs is None else _ROWS
    if pairs is None:
        decode, columns = (_by_byte if by_byte else _one_by_one)(body)
    else:
        decode, columns = _in_pairs(body, *pairs)
    shape = body.node("Gather", "blocks", body.ints(*sizes), axis=0)
    panels = body.node("Gather", body.node("Shape", "codes"), body.ints(0), axis=0)
    ends = body.node("Mul", panels, body.ints(*range(count + 1)))
    ends = body.node("Div", ends, body.ints(count))
    results = []
    for number, target in enumerate(_waiting(body, x, shape, count)):
        bounds = [body.node("Gather", ends, body.ints(number + side), axis=0) for side in (0, 1)]
        codes, scales = (
            body.node("Slice", tensor, *bounds, body.ints(0)) for tensor in ("codes", "scales")
        )
        octets = body.node("Transpose", codes, perm=axes)
        groups = decode(body.node("Reshape", octets, target))
        factors = body.node("Transpose", scales, perm=[1, 3, 0, 2])
        factors = body.cast(body.node("Reshape", factors, columns), _FLOAT)
        matrix = body.node("Flatten", body.node("Mul", groups, factors), axis=2)
        if padded:
            matrix = body.crop(matrix, (1, 0), "extent", "extent")
        results.append(body.node("MatMul", x, matrix))
    whole = body.node("Concat", *results, axis=-1)
    # Parts keep rows that are padding, which only the last has.
    rows = body.node("Gather", "extent", body.ints(0), axis=0)
    whole = body.node("Slice", whole, body.ints(0), rows, body.ints(-1))
    body.node("Cast", whole, refs={"to": ("dtype", onnx.AttributeProto.INT)})
    attributes = ["extent", "group", "dtype", "precision"]
    return body.finish("HyperMatMul", ["x", *NODE_INPUTS], attributes)


def _in_pairs(body: Body, bits: int, state_bits: int) -> tuple[_Decode, str]:
    """Groups are (G, g, N)."""
    pairs = pair_bodies.Pairs(body, bits, state_bits)
    columns = body.ints(0, 0, -1)
    return lambda octets: pairs.decode(octets, "nghp,jhp->gjn"), columns


def _by_byte(body: Body) -> tuple[_Decode, str]:
    """Groups are (G, g, N, 1)."""
    windows = body.node("Transpose", byte_bodies.window_matrix(body), perm=[1, 0])
    filters = byte_bodies.filters(body)
    values = byte_bodies.pair_values(body)

    def decode(octets: str) -> str:
        found = body.node("MatMul", windows, body.cast(octets, _FLOAT))
        states = body.cast(found, _INT32)
        return body.node("Conv", body.node("Gather", values, states, axis=0), filters)

    return decode, body.ints(0, 0, -1, 1)


def _one_by_one(body: Body) -> tuple[_Decode, str]:
    """Groups are (G, g, N)."""
    windows = body.node("Transpose", bodies.window_matrix(body), perm=[1, 0])
    rotation = body.node("Transpose", bodies.rotation_matrix(body), perm=[1, 0])

    def decode(octets: str) -> str:
        states = body.node("MatMul", windows, body.cast(octets, _FLOAT))
        values = bodies.look_up(body, states)
        return body.node("MatMul", rotation, values)

    return decode, body.ints(0, 0, -1)


def _waiting(body: Body, x: str, shape: str, count: int) -> Iterator[str]:
    """`shape` for each part: number k is known in pass k of folding, and not before.

    See `lowering.stages`. What the branches are chosen by is known when the model runs.
    """
    yield shape
    known = body.cast(body.node("ReduceSum", x, keepdims=0), int(TensorProto.BOOL))
    one = body.node("Constant", value=numpy_helper.from_array(np.ones(1, np.float32)))
    groups = body.node("Gather", "blocks", body.ints(1), axis=0)
    token = body.node("Div", groups, groups)
    for _ in range(count - 1):
        token = body.node("Shape", body.node("If", known, **_expanding(body, one, token)))
        yield body.node("Mul", shape, token)


def _expanding(body: Body, one: str, token: str) -> dict[str, onnx.GraphProto]:
    """Both branches of an If: `one` in the shape `token`."""
    result = {}
    for branch in ("then_branch", "else_branch"):
        output = f"{branch}{len(body.nodes)}"
        node = helper.make_node("Expand", [one, token], [output])
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        result[branch] = helper.make_graph([node], output, [], outputs)
    return result
