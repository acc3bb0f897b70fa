"""Weights with so many zeros that to leave them out makes them smaller.

A negative zero is a zero: a trainer's mask leaves as many of them as there were negative weights.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.codecs.sparse.format import (
    MOST_KEPT,
    MaskLayout,
    block_of,
    count_kept,
    is_paired,
)
from onnxcomp.passes.ir.threads import in_threads
from onnxcomp.passes.ir.traversal import default_opset, find_initializer
from onnxcomp.passes.weight import DTYPES, WeightSite

__all__ = ["LEAST_OPSET", "mark_zeros"]

# The operator set that has CumSum, by which a runtime without the operator library finds elements.
LEAST_OPSET = 11


def mark_zeros(
    model: ir.Model, sites: tuple[WeightSite, ...], *, threads: int = 1
) -> tuple[WeightSite, ...]:
    """The sites, with `WeightSite.kept` where that pays; each is read once.

    Args:
        model: The canonical model.
        sites: Its weights.
        threads: How many are looked at at once.
    """
    if (default_opset(model) or 0) < LEAST_OPSET:
        return sites
    return tuple(in_threads(functools.partial(_marked, model), sites, threads, total=len(sites)))


def _marked(model: ir.Model, site: WeightSite) -> WeightSite:
    value = find_initializer(model, site.name)
    # What codecs see of a float64 weight is rounded to float32.
    if value is None or value.const_value is None or site.wide or site.dtype not in DTYPES:
        return site
    stored = np.asarray(value.const_value.numpy())
    kept = count_kept(stored.reshape(-1, site.shape[-1]))
    layout = MaskLayout(site.rows, site.length, kept, DTYPES[site.dtype].itemsize)
    if layout.nbytes >= site.nbytes or kept > MOST_KEPT:
        return site
    # In rows of a length that is no multiple of four, more than half may be kept.
    paired = kept <= 2 * site.rows * -(-site.length // 4)
    matrix = site.matrix(stored)
    paired = paired and is_paired(matrix)
    return dataclasses.replace(site, kept=kept, paired=paired, block=block_of(matrix))
