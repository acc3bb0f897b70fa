"""What is known of weights beyond their place: constants, zeros, and families."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.passes.analysis.constants import mark_constants
from onnxcomp.passes.analysis.families import mark_families
from onnxcomp.passes.analysis.zeros import mark_zeros
from onnxcomp.passes.weight import WeightSite

__all__ = ["with_facts"]


def with_facts(
    model: ir.Model, sites: tuple[WeightSite, ...], *, threads: int = 1
) -> tuple[WeightSite, ...]:
    """The weights of a canonical model, with all that is known of them.

    Args:
        model: The model.
        sites: Its weights.
        threads: How many of them are read at once.
    """
    sites = mark_constants(model, sites, threads=threads)
    return mark_families(model, mark_zeros(model, sites, threads=threads))
