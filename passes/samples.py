"""Inputs that a user gives to a run, read when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxcomp.passes.calibrate import Feed, split_batches

__all__ = ["SampleSource"]


class SampleSource:
    """Calibration inputs, cut into small batches.

    Args:
        data: What `runtime.inputs.load_inputs` reads, or None.
        model: Gives the path of the model that gets them.
    """

    def __init__(self, data: Any, model: Callable[[], Path]) -> None:
        self._data, self._model = data, model
        self._feeds: list[Feed] | None = None

    def __call__(self) -> list[Feed] | None:
        """The inputs by name; None where there are none.

        Raises:
            UsageError: A file cannot be read, or a name, shape or type does not fit the model.
        """
        if self._data is None:
            return None
        if self._feeds is None:
            from onnxcomp.runtime.inputs import load_inputs
            from onnxcomp.runtime.signature import read_signature

            path = self._model()
            dims = {spec.name: spec.dims for spec in read_signature(path)}
            self._feeds = split_batches(load_inputs(self._data, path), dims)
        return self._feeds
