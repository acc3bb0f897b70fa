"""Run a model over calibration data to see what products with fewer inputs read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibrate import HELD_OUT, Feed
from onnxcomp.passes.codecs.codec import Array
from onnxcomp.passes.codecs.moments import ENOUGH
from onnxcomp.passes.prune.axes import Analysis
from onnxcomp.passes.prune.compensate import Sums
from onnxcomp.passes.prune.consumers import Consumer
from onnxcomp.passes.segments import Chain

__all__ = ["Walk", "moments"]

log = logging.getLogger(__name__)


def _wanted(consumer: Consumer) -> list[str]:
    names = [consumer.reads]
    if consumer.addend is not None and consumer.addend.name not in names:
        names.append(consumer.addend.name or "")
    return names


def _ordered(chain: Chain, consumers: Sequence[Consumer]) -> list[Consumer]:
    return sorted(consumers, key=lambda consumer: chain.position(_wanted(consumer)))


def _check(consumer: Consumer, *sums: Sums) -> None:
    if not all(np.isfinite(part.gram).all() and np.isfinite(part.mean).all() for part in sums):
        raise ModelError(
            f"inputs of weight {consumer.name!r} are NaN, infinite or too large",
            hint="correct the calibration data, or leave --data away",
        )


def moments(
    analysis: Analysis,
    consumers: Sequence[Consumer],
    feeds: Sequence[Feed],
    folder: Path | None = None,
) -> Iterator[tuple[Consumer, Sums]]:
    """Means of the inputs of each product and of their squares, in the model as it is.

    `Sums.power` is that of what is read next: the output together with what is added to it.

    Raises:
        ModelError: The model does not run, or inputs are not finite.
    """
    groups = [_wanted(consumer) for consumer in consumers]
    chain = Chain(analysis.model, list(feeds), groups, folder)
    for consumer in _ordered(chain, consumers):
        weight, bias = _dense(consumer)
        sums = Sums(weight.shape[1], 0)
        for values in chain.advance(_wanted(consumer)):
            x = consumer.vectors(values[consumer.reads])
            sums.add(x, None)
            sums.power += _power(consumer, values, x.astype(np.float32) @ weight.T + bias)
        _check(consumer, sums)
        if sums.count < ENOUGH * weight.shape[1]:
            log.warning(
                "%s: %d input vectors for %d columns; %d or more are needed for good fits",
                *(consumer.name, sums.count, weight.shape[1], ENOUGH * weight.shape[1]),
            )
        yield consumer, sums.means()


def _power(consumer: Consumer, values: Mapping[str, Array], outputs: Array) -> float:
    """Sum of the squares of outputs together with what is added to them."""
    if consumer.addend is not None:
        added = np.asarray(values[consumer.addend.name or ""])
        aligned = consumer.outputs(added, len(outputs))
        if aligned is not None and aligned.shape == outputs.shape:
            outputs = outputs + aligned
        else:  # positions were sampled, or it is broadcast: taken as independent
            mean = float(np.square(added, dtype=np.float64).mean())
            return float(np.square(outputs, dtype=np.float64).sum()) + mean * outputs.size
    return float(np.square(outputs, dtype=np.float64).sum())


def _dense(consumer: Consumer) -> tuple[Array, Array]:
    """The weight ``(rows, length)`` and the bias ``(rows,)``, zero without one, in float32."""
    tensor = consumer.weight.const_value
    assert tensor is not None
    weight = consumer.matrix(tensor.numpy()).astype(np.float32)
    if consumer.bias is not None and consumer.bias.const_value is not None:
        return weight, consumer.bias.const_value.numpy().astype(np.float32)
    return weight, np.zeros(len(weight), np.float32)


class Walk:
    """The model on its way to less: each product is seen behind the ones already fitted.

    Args:
        analysis: Of the model.
        consumers: Products that lose columns.
        gone: Which classes go.
        feeds: Calibration data.
        folder: Where segments are written.
    """

    def __init__(
        self,
        analysis: Analysis,
        consumers: Sequence[Consumer],
        gone: Array,
        feeds: Sequence[Feed],
        folder: Path | None = None,
    ) -> None:
        groups = [_wanted(consumer) for consumer in consumers]
        self._feeds = list(feeds)
        self._chain = Chain(analysis.model, self._feeds, groups, folder)
        self._dense = Chain(analysis.model, self._feeds, groups, folder)
        self._consumers = _ordered(self._chain, consumers)
        own = {consumer.name for consumer in consumers}
        for name, array in _masked_members(analysis, gone, own).items():
            self._chain.replace(name, array)

    def replace(self, name: str, array: Array) -> None:
        """Put another initializer in the place of one for all that comes later."""
        self._chain.replace(name, array)

    def __iter__(self) -> Iterator[tuple[Consumer, Sums, Sums]]:
        """Products in order, each with means over calibration data and over held-out data."""
        for consumer in self._consumers:
            yield consumer, *self._observe(consumer)

    def _observe(self, consumer: Consumer) -> tuple[Sums, Sums]:
        weight, bias = _dense(consumer)
        seen, held = (Sums(weight.shape[1], len(weight)) for _ in range(2))
        names = _wanted(consumer)
        runs = zip(self._chain.advance(names), self._dense.advance(names), strict=True)
        for number, (values, exact) in enumerate(runs):
            x = consumer.vectors(values[consumer.reads])
            target = consumer.vectors(exact[consumer.reads]).astype(np.float32) @ weight.T + bias
            shift = _shift(consumer, values, exact, len(x))
            if shift is not None and shift.shape == target.shape:
                target += shift
            self._share(number, x, target, seen, held)
        _check(consumer, seen, held)
        return seen.means(), held.means()

    def _share(self, number: int, x: Array, target: Array, seen: Sums, held: Sums) -> None:
        """Keep every tenth input back, or of a few inputs the last tenth of their vectors."""
        if len(self._feeds) >= HELD_OUT:
            (held if number % HELD_OUT == HELD_OUT - 1 else seen).add(x, target)
            return
        cut = len(x) - len(x) // HELD_OUT
        seen.add(x[:cut], target[:cut])
        held.add(x[cut:], target[cut:])


def _shift(
    consumer: Consumer, values: Mapping[str, Array], exact: Mapping[str, Array], count: int
) -> Array | None:
    """What the value added to the output has lost on the way: the product can make up for it."""
    if consumer.addend is None:
        return None
    name = consumer.addend.name or ""
    return consumer.outputs(exact[name].astype(np.float32) - values[name], count)


def _masked_members(analysis: Analysis, gone: Array, but: set[str]) -> dict[str, Array]:
    """Weights that sum over channels that go, with zeros there, except some."""
    found: dict[str, Array] = {}
    for member in analysis.members:
        tensor, name = member.value.const_value, member.value.name or ""
        if member.role != "in" or tensor is None or name in but:
            continue
        lost = gone[analysis.classes(member.atoms)]
        if lost.any():
            array = found.get(name, tensor.numpy())
            shape = [s if a in member.axes else 1 for a, s in enumerate(array.shape)]
            found[name] = np.where(lost.reshape(shape), np.zeros_like(array), array)
    return found
