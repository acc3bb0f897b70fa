"""Singular values of weights that low-rank factors store, for the report."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.weight import Array

__all__ = ["Spectrum", "spectra", "thinned"]

# Numbers of singular values, counted from 1, with the values relative to the largest one.
Spectrum = tuple[tuple[int, float], ...]

# Values of one weight in the report.
_POINTS = 64

# Length of the shorter side of a weight above which its values take too long.
_LARGEST = 2048


def thinned(values: Array) -> Spectrum:
    """Some of the values, denser among the first ones, relative to the largest."""
    count = len(values)
    if count == 0 or values[0] <= 0.0:
        return ()
    numbers = np.unique(np.rint(np.geomspace(1, count, min(count, _POINTS))).astype(int))
    return tuple((int(n), float(f"{values[n - 1] / values[0]:.4g}")) for n in numbers)


def spectra(model: ir.Model, placements: Iterable[Placement]) -> dict[str, Spectrum]:
    """Spectra by name of the weights whose codec cuts one off.

    Args:
        model: The model before it is rewritten; only read, one weight at a time.
        placements: What is stored.
    """
    return {
        placement.site.name: thinned(placement.codec.spectrum(read_weight(model, placement.site)))
        for placement in placements
        if placement.codec.spectrum is not None
        and min(placement.site.rows, placement.site.length) <= _LARGEST
    }
