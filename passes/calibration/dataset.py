"""Inputs that a user gives to a run, read when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxcomp.passes.calibration.statistics import split_batches
from onnxcomp.passes.weight import Feed

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
        self._whole: list[Feed] | None = None

    def whole(self) -> list[Feed] | None:
        """The inputs as they were given; None where there are none.

        Raises:
            UsageError: A file cannot be read, or a name, shape or type does not fit the model.
        """
        if self._data is not None and self._whole is None:
            from onnxcomp.runtime.inputs import load_inputs

            self._whole = list(load_inputs(self._data, self._model()))
        return self._whole

    def __call__(self) -> list[Feed] | None:
        """The inputs by name; None where there are none.

        Raises:
            UsageError: A file cannot be read, or a name, shape or type does not fit the model.
        """
        whole = self.whole()
        if whole is not None and self._feeds is None:
            from onnxcomp.runtime.signature import read_signature

            dims = {spec.name: spec.dims for spec in read_signature(self._model())}
            self._feeds = split_batches(whole, dims)
        return self._feeds
