"""Give products whose weights are most of a model a definition that expands some rows at a time.

One product that holds most of the weights is more than `stages` can do about: it is expanded in one
piece. A codec may have a definition that multiplies by parts of the rows, which wait for each
other. It serves all products of the operator, so it is taken where these are few.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from onnxcomp.passes.codecs.load_memory import LoadMemory
from onnxcomp.passes.ir.manifest import STAGE_KEY
from onnxcomp.passes.ir.traversal import default_opset, scopes
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.lowering.stages import calls_of, kind_of

__all__ = ["divide_products", "passes_of"]

# Parts, and how many products of a model may have them: nodes take time, too.
_PARTS = 7
_FEW = 4

# Products that take less memory than this to expand, or less than this share of what all weights
# take, are left whole.
_LEAST = 32 << 20
_SHARE = 4


def passes_of(products: Sequence[LoadMemory], others: int) -> int:
    """In how many passes the products of one operator are best expanded.

    Args:
        products: What each takes.
        others: Memory that all other weights take.
    """
    largest = max((need.kept for need in products), default=0)
    total = others + sum(need.kept for need in products)
    divided = len(products) <= _FEW and largest >= _LEAST and _SHARE * largest >= total
    return _PARTS if divided else 1


def divide_products(model: ir.Model, placements: Sequence[Placement]) -> int:
    """Replace the definition of products where that takes less memory, in place.

    Args:
        model: A model that `rewrite` made, with functions.
        placements: What was placed.

    Returns:
        In how many parts products are expanded; 1 where nothing was changed.
    """
    calls = calls_of(model, placements)
    products = [call for call in calls if kind_of(call.node.op_type) == "matmul"]
    operators = {call.node.op_identifier() for call in products}
    if len(operators) != 1 or len(products) != len(_nodes(model, *operators)):
        return 1
    others = sum(call.need.kept for call in calls) - sum(call.need.kept for call in products)
    count = passes_of([call.need for call in products], others)
    body = _body(model, [call.placement for call in products], count) if count > 1 else None
    if body is None:
        return 1
    function = ir.serde.deserialize_function(body)
    function.metadata_props[STAGE_KEY] = str(count)
    model.functions[function.identifier()] = function
    return count


def _nodes(model: ir.Model, operator: ir.OperatorIdentifier) -> list[ir.Node]:
    """All calls of an operator, those of earlier compressions as well."""
    nodes = (node for scope in scopes(model) for node in scope.graph)
    return [node for node in nodes if node.op_identifier() == operator]


def _body(
    model: ir.Model, placements: Sequence[Placement], count: int
) -> onnx.FunctionProto | None:
    """A definition for products with all of these weights, if there is one."""
    (codec, *others) = {placement.codec for placement in placements}
    special, opset = codec.special, default_opset(model)
    if others or special is None or opset is None:
        return None
    return special.product(opset, [placement.payload for placement in placements], count)
