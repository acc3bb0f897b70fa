"""Which Einsum is a product with matrices of a stack, and how MatMul would be asked for it.

``Einsum("th,tkhi->tki", x, W)`` is ``Squeeze(MatMul(Unsqueeze(x, [1, 2]), W), [2])``: letters of W
are those of what stands in front of its matrices, and two for their axes; one is summed over.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

__all__ = ["EinsumProduct", "einsum_product"]


@dataclasses.dataclass(frozen=True, slots=True)
class EinsumProduct:
    """The way of the other operand x to a MatMul, and of the result back.

    Attributes:
        turned: Whether the sum is over the last axis of the matrices.
        perm: Axes of x in the order of those of W in front of its matrices, then the axis of rows
            where x has one that W has not, then the one that is summed over.
        added: Axes of one entry that x gets then.
        rows: Whether x has an axis of rows.
        order: Axes of the product in the order of the output.
        summed: Axis of x that is summed over.
    """

    turned: bool
    perm: tuple[int, ...]
    added: tuple[int, ...]
    rows: bool
    order: tuple[int, ...]
    summed: int


def einsum_product(node: ir.Node, index: int) -> EinsumProduct | None:
    """How a node multiplies the matrices that are its input `index`; None where it does not."""
    letters = _letters(node)
    if node.op_type != "Einsum" or letters is None:
        return None
    *operands, out = letters
    if len(operands) != 2 or len(operands[index]) < 3:
        return None
    weight, x = operands[index], operands[1 - index]
    front, pair = weight[:-2], weight[-2:]
    summed = [letter for letter in pair if letter in x and letter not in out]
    own = [letter for letter in pair if letter in out and letter not in x]
    free = [letter for letter in x if letter not in weight]
    if len(summed) != 1 or len(own) != 1 or len(free) > 1:
        return None
    natural = front + "".join(free) + own[0]
    if sorted(natural) != sorted(out):
        return None
    shared = [letter for letter in front if letter in x]
    return EinsumProduct(
        turned=summed[0] == pair[1],
        perm=tuple(x.index(letter) for letter in (*shared, *free, summed[0])),
        added=tuple(
            axis for axis, letter in enumerate((*front, *(free or "-"))) if letter not in x
        ),
        rows=bool(free),
        order=tuple(natural.index(letter) for letter in out),
        summed=x.index(summed[0]),
    )


def _letters(node: ir.Node) -> tuple[str, ...] | None:
    """Letters of the operands and of the output; None for equations that leave something open."""
    given = node.attributes.get("equation")
    if given is None or not isinstance(given.value, str):  # other bytes than UTF-8 stay bytes
        return None
    equation = "".join(given.value.split())
    operands, arrow, out = equation.partition("->")
    if not arrow or "." in equation:
        return None
    found = (*operands.split(","), out)
    return found if all(len(set(part)) == len(part) for part in found) else None
