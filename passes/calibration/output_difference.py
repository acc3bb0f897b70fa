"""How far outputs are from exact ones: their noise, and the loss that a user would see.

Noise is the squared error relative to the power of the output. The loss is that of `--tune`: the
divergence of Kullback and Leibler, in nats, of outputs that are distributions or logits of some,
and the noise of the others. A change of logits that all words share is noise and no loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.output_kinds import OutputKind, output_kinds
from onnxcomp.passes.weight import Array

__all__ = ["Difference", "OutputDifference", "kinds_by_name"]

# Added to probabilities before a division, so that none divides by zero.
_LEAST = 1e-9


class Difference(NamedTuple):
    """Numbers of one comparison.

    Attributes:
        noise: Mean over outputs of ``|y' - y|^2 / |y|^2``.
        loss: Mean over the outputs that count of their loss.
    """

    noise: float
    loss: float


def kinds_by_name(model: ir.Model) -> dict[str, OutputKind]:
    """The floating-point outputs that a loss is computed of, and how; see `output_kinds`."""
    floats = (
        value
        for value in model.graph.outputs
        if value.producer() is not None and (value.dtype is None or value.dtype.is_floating_point())
    )
    return {value.name or "": kind for value, kind in output_kinds(model.graph, floats).items()}


class OutputDifference:
    """Differences of outputs, added up over runs, for each output by name.

    Args:
        kinds: What outputs are; values where that is not told.
    """

    def __init__(self, kinds: Mapping[str, OutputKind]) -> None:
        self._kinds = kinds
        self._power: dict[str, float] = {}
        self._wrong: dict[str, float] = {}
        self._divergence: dict[str, tuple[float, float]] = {}
        self._runs: list[dict[str, float]] = []

    def add(self, exact: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """Take in one run; only outputs of the same size in both count."""
        own: dict[str, float] = {}
        self._runs.append(own)
        for name, array in exact.items():
            if name not in found or found[name].shape != array.shape:
                continue
            wide = array.astype(np.float64)
            self._power[name] = self._power.get(name, 0.0) + float(np.square(wide).sum())
            wide -= found[name]
            own[name] = float(np.square(wide).sum())
            self._wrong[name] = self._wrong.get(name, 0.0) + own[name]
            kind = self._kinds.get(name, "values")
            if kind != "values" and array.ndim:
                total, count = self._divergence.get(name, (0.0, 0.0))
                more, distributions = _divergence(kind, array, found[name])
                self._divergence[name] = (total + more, count + distributions)
                own[name] = more

    def by_name(self) -> dict[str, Difference]:
        """Noise and loss of each output that is not zero, over all runs."""
        noise = {n: self._wrong[n] / power for n, power in self._power.items() if power > 0.0}
        return {name: Difference(value, self._loss(name, value)) for name, value in noise.items()}

    def _loss(self, name: str, noise: float) -> float:
        if name in self._divergence:
            total, count = self._divergence[name]
            return total / count if count else 0.0
        return noise

    def mean(self) -> Difference:
        """Means over the outputs.

        Raises:
            ModelError: No output says anything.
        """
        return mean_of(self.by_name(), self._kinds)

    def losses(self) -> Array:
        """The loss by runs, ``(runs,)``; their mean is that of all.

        Raises:
            ModelError: No output says anything.
        """
        found = self.by_name()
        told = [name for name in found if name in self._kinds] or list(found)
        self.mean()
        total = {
            n: self._divergence[n][1] if n in self._divergence else self._power[n] for n in told
        }
        runs = [sum(own.get(n, 0.0) / total[n] for n in told if total[n]) for own in self._runs]
        return np.array(runs) * len(runs) / len(told)

    def uncertainty(self) -> float:
        """Standard error of the mean loss over that loss; infinite where one run was all.

        Raises:
            ModelError: No output says anything.
        """
        losses = self.losses()
        if len(losses) < 2:
            return math.inf
        mean = float(losses.mean())
        error = float(losses.std(ddof=1)) / math.sqrt(len(losses))
        return error / mean if mean else 0.0

    def worst_noise(self) -> float:
        """Noise of the worst output.

        Raises:
            ModelError: No output says anything.
        """
        self.mean()
        return max(found.noise for found in self.by_name().values())


def mean_of(found: Mapping[str, Difference], kinds: Mapping[str, OutputKind]) -> Difference:
    """Means over outputs; only those that are told of count in the loss, if there are any.

    Raises:
        ModelError: There are none.
    """
    if not found:
        raise ModelError("every output is zero or not floating point on these inputs")
    told = [name for name in found if name in kinds] or list(found)
    noise = sum(one.noise for one in found.values()) / len(found)
    return Difference(noise, sum(found[name].loss for name in told) / len(told))


def _divergence(kind: OutputKind, exact: Array, found: Array) -> tuple[float, float]:
    """Divergence of all distributions together, and their number.

    ``sum p (log p - log q)`` as a sum of terms that are never negative: ``p (e^d - 1 - d)`` with
    ``d = log q - log p``, which are small where the two are close.
    """
    p, q = exact.astype(np.float32), found.astype(np.float32)
    if kind == "Softmax":
        ratio = np.log((q + _LEAST) / (p + _LEAST))
        return float((q - p - p * ratio).sum(dtype=np.float64)), float(p.sum(dtype=np.float64))
    if kind == "logits":
        p, q = _log_softmax(p), _log_softmax(q)
    q -= p
    terms = np.exp(p) * (np.expm1(q) - q)
    return float(terms.sum(dtype=np.float64)), p.size / p.shape[-1]


def _log_softmax(logits: Array) -> Array:
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
