"""What is known of weights beyond their place: constants, zeros, and families."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.passes.analysis.constants import mark_constants
from onnxcomp.passes.analysis.families import mark_families
from onnxcomp.passes.analysis.zeros import mark_zeros
from onnxcomp.passes.weight import WeightSite

__all__ = ["with_facts"]


def with_facts(model: ir.Model, sites: tuple[WeightSite, ...]) -> tuple[WeightSite, ...]:
    """The weights of a canonical model, with all that is known of them."""
    return mark_families(model, mark_zeros(model, mark_constants(model, sites)))
