"""Weights with equal tables and groups, expanded together: the nodes of one for all of them.

ONNX Runtime takes about 60 microseconds for each node that it folds when a session is created,
most of it to look at the model again, and a body has a dozen. What follows the bytes does not
depend on the shape of a weight: rows of one group each, of any number of weights.

Names follow ops/hyper/spec.md: P panels of 16 rows, G groups of g weights in B bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from onnxcomp.passes.codecs.builder import Builder
from onnxcomp.passes.codecs.hyper.format import LANES, NODE_INPUTS
from onnxcomp.passes.weight import DOMAIN

__all__ = ["HyperJoining"]

V = TypeVar("V")

_CODES, _SCALES, _TABLE, _BLOCKS, _TAPS = map(
    NODE_INPUTS.index, ("codes", "scales", "table", "blocks", "taps")
)


class HyperJoining:
    """The `Joining` of the hyperfunction codec."""

    def settings(self, inputs: Sequence[V]) -> tuple[V, ...]:
        """The table, and what follows from bits, states and groups."""
        return inputs[_TABLE], *inputs[_TAPS:]

    def width(self, attributes: Mapping[str, int]) -> int:
        """Weights of a group."""
        return attributes["group"]

    def parts(self, extent: tuple[int, int], width: int) -> tuple[int, int]:
        """Groups of its rows, and of the rows that fill its last panel."""
        rows, length = extent
        groups = -(-length // width)
        return rows * groups, -rows % LANES * groups

    def emit(self, builder: Builder[V], calls: Sequence[Sequence[V]], groups: Sequence[int]) -> V:
        """HyperRows of all bytes (N, B) and scales (N, 1)."""
        first = calls[0]
        place = builder.constant("ints.0x2", np.array([0, 2], np.int64))
        # What is large waits for `blocks`: -1 and B of them are the shape of the bytes.
        shape = builder.node("Gather", [first[_BLOCKS], place], {"axis": 0})
        column = builder.constant("ints.-1x1", np.array([-1, 1], np.int64))
        octets, factors = [], []
        for count, alike in itertools.groupby(zip(groups, calls, strict=True), lambda x: x[0]):
            inputs = [call for _, call in alike]
            codes = _together(builder, [call[_CODES] for call in inputs])
            scales = _together(builder, [call[_SCALES] for call in inputs])
            lanes = builder.node("Transpose", [codes], {"perm": [0, 3, 1, 2, 4]})
            octets.append(builder.node("Reshape", [lanes, shape]))
            if count > 1:
                scales = builder.node("Transpose", [scales], {"perm": [0, 2, 1, 3]})
            factors.append(builder.node("Reshape", [scales, column]))
        rows = [_together(builder, octets), _together(builder, factors)]
        return builder.node("HyperRows", [*rows, *self.settings(first)], domain=DOMAIN)


def _together(builder: Builder[V], values: Sequence[V]) -> V:
    return values[0] if len(values) == 1 else builder.node("Concat", values, {"axis": 0})
