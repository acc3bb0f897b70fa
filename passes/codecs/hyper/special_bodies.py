"""Which definition serves weights of some layouts best, where that is not the general one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from onnxcomp.passes.codecs.hyper import byte_bodies, pair_bodies, part_bodies
from onnxcomp.passes.codecs.hyper.format import LANES, GroupLayout
from onnxcomp.passes.codecs.hyper.joined_bodies import HyperJoining

__all__ = ["HyperJoining", "product", "rows", "weight"]


def weight(opset: int, layout: GroupLayout) -> onnx.FunctionProto | None:
    """The definition of HyperWeight for a weight; None where the general one is as good."""
    return byte_bodies.weight(opset) if layout.bits == byte_bodies.BITS else None


def rows(opset: int, layout: GroupLayout) -> onnx.FunctionProto | None:
    """The definition of HyperRows for such weights; None where the general one is as good."""
    sizes = layout.bits, layout.state_bits
    return pair_bodies.rows(opset, *sizes) if pair_bodies.suits(opset, *sizes) else None


def product(
    opset: int, layouts: Sequence[GroupLayout], passes: int, types: frozenset[str]
) -> onnx.FunctionProto | None:
    """The definition of products with these weights; None where the general one is as good.

    Args:
        opset: Version of the default domain in the model.
        layouts: Sizes of the weights.
        passes: In how many passes they are expanded.
        types: Element types that the products compute in.
    """
    by_byte = all(layout.bits == byte_bodies.BITS for layout in layouts)
    padded = any(layout.length % layout.group for layout in layouts)
    cut = padded or any(layout.rows % LANES for layout in layouts)
    cast = types != {"float32"}
    (sizes, *others) = {(layout.bits, layout.state_bits) for layout in layouts}
    paired = not others and pair_bodies.suits(opset, *sizes)
    if passes == 1 and paired:
        return pair_bodies.matmul(opset, *sizes, padded=cut, cast=cast)
    if passes == 1 and by_byte:
        return byte_bodies.matmul(opset, padded=cut, cast=cast)
    if (
        passes == 1
        or opset < part_bodies.MINIMUM_OPSET
        or any(each.panels < passes for each in layouts)
    ):
        return None
    pairs = sizes if paired else None
    return part_bodies.matmul(opset, passes, by_byte=by_byte, padded=padded, pairs=pairs)
