"""What changed weights do to the outputs of a model, measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.output_difference import OutputDifference, kinds_by_name
from onnxcomp.passes.calibration.sensitivity import spread
from onnxcomp.passes.calibration.statistics import HELD_OUT
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.weight import Array, Feed

__all__ = ["OutputLoss"]

# Bytes of exact outputs that are kept to compare with.
_BYTES = 1 << 28

# What counts as the worst loss.
_WORST = 1e9


class OutputLoss:
    """The loss of the outputs when some initializers hold other numbers.

    Args:
        model: The model; only read.
        names: Initializers that may be given other values.
        feeds: Calibration data.
        most: How many inputs are used, at most.
        folder: Where the model is written for ONNX Runtime; has to stay.
        apart: Whether those inputs alone are used that fits set aside, where there are any.

    Raises:
        ModelError: The model does not run.
    """

    def __init__(
        self,
        model: ir.Model,
        names: Iterable[str],
        feeds: Sequence[Feed],
        most: int,
        folder: Path,
        *,
        apart: bool = True,
    ) -> None:
        from onnxcomp.runtime.session import open_session

        copy = copy_model(model)
        self._dense = {name: _as_input(copy, name) for name in dict.fromkeys(names)}
        self._kinds = kinds_by_name(copy)
        self._session = open_session(save(copy, folder / "probe.onnx").files[0])
        self._feeds: list[Feed] = []
        self._exact: list[Mapping[str, Array]] = []
        size = 0
        for feed in _probes(feeds, most) if apart else spread(feeds, most):
            found = self._outputs(feed, self._dense)
            size += sum(array.nbytes for array in found.values())
            if self._exact and size > _BYTES:
                break
            self._feeds.append(feed)
            self._exact.append(found)

    @property
    def tells(self) -> bool:
        """Whether any output says something."""
        return any(array.any() for found in self._exact for array in found.values())

    def __call__(self, changed: Mapping[str, Array]) -> float:
        """The mean loss with other values of some initializers; a large number if it is NaN.

        Args:
            changed: By name; all others are as in the model.
        """
        weights = dict(self._dense)
        for name, array in changed.items():
            weights[name] = array.astype(weights[name].dtype, copy=False)
        difference = OutputDifference(self._kinds)
        for feed, exact in zip(self._feeds, self._exact, strict=True):
            difference.add(exact, self._outputs(feed, weights))
        loss = difference.mean().loss
        return min(loss, _WORST) if np.isfinite(loss) else _WORST

    def _outputs(self, feed: Feed, weights: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs that count."""
        from onnxcomp.runtime.evaluate import run_session

        found = run_session(self._session, {**feed, **weights})
        return {n: found[n] for n in self._kinds if found[n].dtype.kind == "f"}


def _as_input(model: ir.Model, name: str) -> Array:
    """Make an initializer an input of the model; what it holds."""
    value = model.graph.initializers.pop(name)
    assert value.const_value is not None
    array = np.asarray(value.const_value.numpy())
    value.const_value = None
    if not value.is_graph_input():
        model.graph.inputs.append(value)
    return array


def _probes(feeds: Sequence[Feed], most: int) -> list[Feed]:
    held = feeds[HELD_OUT - 1 :: HELD_OUT]
    return spread(held if len(held) > 1 else feeds, most)
