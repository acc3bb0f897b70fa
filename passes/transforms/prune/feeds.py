"""Inputs to learn sizes from: two sets that differ where sizes are free."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.ir.model import save
from onnxcomp.passes.transforms.prune.hollow import for_sizes, unoptimised_session
from onnxcomp.runtime.evaluate import Feed, run_session
from onnxcomp.runtime.inputs import synthesize_inputs

__all__ = ["probe_feeds"]


def probe_feeds(model: ir.Model, given: Feed | None = None) -> list[Feed]:
    """Inputs the model accepts.

    Args:
        model: The model; only read.
        given: Inputs that are known to fit.

    Returns:
        The given or made-up inputs, and where free sizes can be changed a second set.

    Raises:
        UsageError: The model fails on all made-up inputs.
    """
    with tempfile.TemporaryDirectory() as folder:
        lean = for_sizes(model)
        path = save(lean, Path(folder) / "model.onnx").files[0]
        trial = None
        if lean is not model:
            trial = functools.partial(run_session, unoptimised_session(path))
        first = given if given is not None else synthesize_inputs(path, trial=trial)[0]
        other = {name: _larger(model, name, np.shape(array)) for name, array in first.items()}
        if all(other[name] == np.shape(array) for name, array in first.items()):
            return [first]
        for shapes in (other, _with_batch(model, first)):
            try:
                return [first, synthesize_inputs(path, shapes=shapes, trial=trial)[0]]
            except CompressionError:
                continue
    return [first]


def _free(model: ir.Model, name: str) -> list[str | None]:
    """For each axis of an input its name, "" where it has none, None where it is fixed."""
    value = next(value for value in model.graph.inputs if value.name == name)
    if value.shape is None:
        return []
    return [None if isinstance(dim, int) else str(dim.value or "") for dim in value.shape]


def _step(size: int) -> int:
    """What a size grows by: images by 32, so that strides still divide them."""
    return 32 if size >= 64 and size % 32 == 0 else 1


def _larger(model: ir.Model, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    free = _free(model, name)
    grown = zip(shape, free or [None] * len(shape), strict=True)
    return tuple(
        size if axis is None or "+" in axis or "total" in axis else size + _step(size)
        for size, axis in grown
    )


def _with_batch(model: ir.Model, feed: Feed) -> dict[str, tuple[int, ...]]:
    """Shapes with another first size only."""
    return {
        name: (np.shape(array)[0] + 1, *np.shape(array)[1:])
        if np.ndim(array) and _free(model, name)[:1] != [None]
        else np.shape(array)
        for name, array in feed.items()
    }
