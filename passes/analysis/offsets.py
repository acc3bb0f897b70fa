"""Constants that are added to the products of a weight, channel by channel.

Errors of a weight move the means of its products, by ``E[x]`` times the error. Where the model adds
a constant of its own to each channel, the bias of a convolution or what a BatchNormalization behind
it subtracts, this can be taken back at no cost.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.weight import DTYPES, Array, Shift, WeightSite

__all__ = ["Offset", "apply_shift", "offset_of", "shifted"]

# Positions of a bias among the inputs of a convolution, and of the means among those of a
# BatchNormalization.
_BIAS, _MEANS = 2, 3


@dataclasses.dataclass(frozen=True, slots=True)
class Offset:
    """The constant behind a product.

    Attributes:
        name: Name of the initializer, with one value for each row of the weight.
        sign: 1 where it is added, -1 where it is subtracted.
    """

    name: str
    sign: int

    def shift(self, change: Array) -> Shift:
        """What to add to the initializer, for products that have to grow by `change` (rows,)."""
        return Shift(self.name, np.asarray(self.sign * change, np.float32))


def offset_of(model: ir.Model, site: WeightSite) -> Offset | None:
    """The constant that is added to the products of one convolution, and to nothing else.

    None where there is none, where others read it, where the weight has several uses, and where it
    is used in a subgraph.
    """
    node = _convolution(model, site)
    if node is None:
        return None
    if len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
        return _own(model, node.inputs[_BIAS], site.rows, 1)
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    reader, index = uses[0]
    if reader.op_type != "BatchNormalization" or index or not is_default_domain(reader.domain):
        return None
    if reader.attributes.get_int("training_mode", 0):
        return None
    return _own(model, reader.inputs[_MEANS], site.rows, -1)


def _convolution(model: ir.Model, site: WeightSite) -> ir.Node | None:
    """The convolution that is the only use of a weight."""
    if len(site.uses) != 1 or site.uses[0].path or site.uses[0].input_index != 1:
        return None
    if site.uses[0].op_type != "Conv":
        return None
    return next((node for node in model.graph if node.name == site.uses[0].node), None)


def _own(model: ir.Model, value: ir.Value | None, rows: int, sign: int) -> Offset | None:
    """An initializer of the main graph that one node reads, once, with a value for each row."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    if value.graph is not model.graph or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    kinds = {ir.DataType.from_numpy(kind) for kind in DTYPES.values()}
    if value.const_value.dtype not in kinds or list(value.const_value.shape) != [rows]:
        return None
    return Offset(value.name or "", sign)


def shifted(model: ir.Model, shift: Shift) -> ir.TensorProtocol:
    """The initializer of a shift with the shift added; its type and size are the same.

    Raises:
        ModelError: The model has no such initializer.
    """
    value = model.graph.initializers.get(shift.name)
    if value is None or value.const_value is None:
        raise ModelError(f"the model has no initializer {shift.name!r}")
    kind = value.const_value.dtype
    moved = value.const_value.numpy().astype(np.float32) + shift.change
    return ir.Tensor(moved.astype(kind.numpy()), dtype=kind, name=value.name)


def apply_shift(model: ir.Model, shift: Shift) -> None:
    """Add a shift to its initializer, in place.

    Raises:
        ModelError: The model has no such initializer.
    """
    moved = shifted(model, shift)
    model.graph.initializers[shift.name].const_value = moved
