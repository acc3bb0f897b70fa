"""Products that write to a residual stream: what the stream has lost so far they can add.

``y = r + W x``: where the compressed model's ``r`` differs from the dense model's by ``d``, the
product closest to what is missing is ``W x_ref + d`` and not ``W x_ref``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.im2col import Patches, patches
from onnxcomp.passes.calibration.second_moments import add_products
from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.weight import Array, Missing, WeightSite

__all__ = ["MissingSums", "Stream", "missing_vectors", "products", "stream_of", "token_scales"]

# Input vectors multiplied at a time.
_CHUNK = 4096

# Rows of sums that are converted at a time.
_BLOCK = 512

# Sums below this share of the median one count as if they had it.
_LEAST = 0.1

_PRODUCTS = ("MatMul", "Gemm", "Conv")


# Operators that divide by the size of what they read, or begin to do so.
_NORMALISES = frozenset(
    (
        *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
        *("Pow", "ReduceMean", "ReduceL2", "ReduceSumSquare"),
    )
)


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """What a product is added to.

    Attributes:
        value: Name of the value.
        normalised: Whether the sum is normalised by those who read it, so that errors count
            relative to the size of the sum at their place.
    """

    value: str
    normalised: bool


def stream_of(model: ir.Model, site: WeightSite) -> Stream | None:
    """The stream that a weight's only product is added to; None where there is none.

    Constant summands between the two, such as a bias, are passed over. The value has to exist
    before the product runs.
    """
    places = {node: number for number, node in enumerate(model.graph)}
    nodes = [node for node in places if node.name == site.uses[0].node]
    if len(site.uses) != 1 or not nodes or nodes[0].op_type not in _PRODUCTS:
        return None
    value = nodes[0].outputs[0]
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return None
        node, index = uses[0]
        if node.op_type != "Add" or not is_default_domain(node.domain):
            return None
        other = node.inputs[1 - index]
        if other is None or (other.is_graph_input() and not other.is_initializer()):
            return None
        if not other.is_initializer():
            producer = other.producer()
            early = producer is not None and places.get(producer, len(places)) < places[nodes[0]]
            readers = (reader.op_type in _NORMALISES for reader, _ in node.outputs[0].uses())
            return Stream(other.name or "", any(readers)) if early else None
        value = node.outputs[0]


def missing_vectors(exact: Array, found: Array, cut: Patches | None, rows: int) -> Array | None:
    """What a stream lacks at each place: ``(vectors, rows)``; None where shapes do not fit.

    Args:
        exact: The stream of the dense model.
        found: That of the compressed one.
        cut: Of a convolution: its stream has channels in the second axis.
        rows: Rows of the weight.
    """
    if exact.shape != found.shape or exact.ndim < 2:
        return None
    lost = exact.astype(np.float32, copy=False) - found.astype(np.float32, copy=False)
    if cut is not None:
        return patches(lost, Patches.points(lost.ndim - 2)) if lost.shape[1] == rows else None
    return lost.reshape(-1, rows) if lost.shape[-1] == rows else None


def products(columns: Array, x: Array, *, rows: slice | None = None, threads: int = 1) -> Array:
    """``x W^T``, where rows of the weight do not depend on which others are wanted.

    Args:
        columns: W^T, float32 ``(length, rows)``.
        x: float32 ``(n, length)``.
        rows: Rows of the weight that are wanted; None for all. The others come out as zeros.
        threads: Threads of the native code, where that is there.

    Returns:
        float32 ``(n, rows)``.
    """
    found = np.empty((len(x), columns.shape[1]), np.float32)
    for start in range(0, len(x), _CHUNK):
        part = slice(start, start + _CHUNK)
        total = np.zeros((columns.shape[1], len(x[part])))
        add_products(total, columns, np.ascontiguousarray(x[part].T), rows=rows, threads=threads)
        found[part] = total.T
    return found


def token_scales(stream: Array, x: Array, weight: Array) -> Array:
    """What vectors of each place are multiplied by, so that errors count relative to the sum.

    A few tokens of language models have sums a hundred times as large as others; what is normalised
    next forgets that, and squared errors do not.

    Args:
        stream: Of the dense model, ``(n, rows)``.
        x: Inputs of the product there, ``(n, length)``.
        weight: ``(rows, length)``.

    Returns:
        One over the root of the mean square of the sum, float32 ``(n, 1)``.
    """
    total = stream + x.astype(np.float32, copy=False) @ weight.T
    size = np.sqrt(np.square(total).mean(axis=1, keepdims=True, dtype=np.float64))
    floor = _LEAST * float(np.median(size))
    return np.asarray(1.0 / np.maximum(size, floor if floor > 0.0 else 1.0), np.float32)


class MissingSums:
    """Sums over vectors that a product or a stream lacks, and inputs of the product.

    Args:
        rows: Rows of the weight.
        length: Columns of the weight.
        held: Whether sums to judge by are kept as well.
        some: Rows of these sums that are wanted; None for all.
        threads: Threads of the sums.
    """

    def __init__(
        self, rows: int, length: int, *, held: bool, some: slice | None = None, threads: int = 1
    ) -> None:
        self._threads, self._some = threads, some
        self._count = 0
        self._valid = True
        self._power = 0.0
        self._sum = np.zeros(rows)
        self._cross = np.zeros((rows, length))
        self._exact = np.zeros((rows, length)) if held else None

    def add(self, lost: Array | None, x: Array, reference: Array) -> None:
        """Add ``(n, rows)`` and the inputs ``(n, length)`` of both models; None ends it all."""
        if lost is None or len(lost) != len(x):
            self._valid = False
            return
        for start in range(0, len(x), _CHUNK):
            part = slice(start, start + _CHUNK)
            lacking = lost[part]
            self._power += float(np.square(lacking).sum(dtype=np.float64))
            self._sum += lacking.sum(axis=0, dtype=np.float64)
            inputs = x[part].astype(np.float32, copy=False)
            add_products(self._cross, lacking, inputs, rows=self._some, threads=self._threads)
            if self._exact is not None:
                inputs = reference[part].astype(np.float32, copy=False)
                add_products(self._exact, lacking, inputs, rows=self._some, threads=self._threads)
        self._count += len(x)

    def cut(self) -> None:
        """Leave out the rows that are not wanted."""
        if self._some is not None:
            self._cross = self._cross[self._some]
            self._exact = None if self._exact is None else self._exact[self._some]

    def join(self, others: Sequence[MissingSums]) -> None:
        """Take the rows of others that have been cut, all of the same vectors."""
        first = others[0]
        self._count, self._valid = first._count, first._valid
        self._power, self._sum = first._power, first._sum
        for other in others:
            assert other._some is not None
            self._cross[other._some] = other._cross
            if self._exact is not None and other._exact is not None:
                self._exact[other._some] = other._exact

    @property
    def _known(self) -> bool:
        return self._valid and self._count > 0 and bool(np.isfinite(self._power))

    def mean(self) -> Array | None:
        """``E[d x^T]`` in float32 ``(rows, length)``; None as `means` says."""
        if not self._known:
            return None
        found = np.empty(self._cross.shape, np.float32)
        for start in range(0, len(found), _BLOCK):
            part = slice(start, start + _BLOCK)
            found[part] = self._cross[part] / self._count
        return found

    def means(self) -> Missing | None:
        """Means; None where vectors were missing or not finite."""
        if not self._known:
            return None
        count = self._count
        exact = None if self._exact is None else self._exact / count
        return Missing(self._cross / count, exact, self._power / count, self._sum / count)
