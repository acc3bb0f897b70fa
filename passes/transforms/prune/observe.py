"""Run a model over calibration data to see what products with fewer inputs read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibration.notices import warn_of_few_vectors
from onnxcomp.passes.calibration.segmented_run import Chain
from onnxcomp.passes.calibration.statistics import HELD_OUT
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.compensate import ANCHORED, Sums, temper, tempered
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.depthwise import Depthwise, FilterSums
from onnxcomp.passes.transforms.prune.norms import ChannelSums, Norm
from onnxcomp.passes.transforms.prune.qk_products import silenced
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Collector", "masked_members", "moments"]

log = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Consumer | Depthwise | Norm)
Kept = TypeVar("Kept", Sums, FilterSums, ChannelSums)


def _ordered(chain: Chain, items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: chain.position(item.wanted))


def _check(consumer: Consumer, *sums: Sums) -> None:
    if not all(np.isfinite(part.gram).all() and np.isfinite(part.mean).all() for part in sums):
        raise ModelError(
            f"inputs of weight {consumer.name!r} are NaN, infinite or too large",
            hint="correct the calibration data, or leave out --data",
        )


def moments(
    analysis: Analysis,
    consumers: Sequence[Consumer],
    feeds: Sequence[Feed],
    folder: Path | None = None,
    *,
    centred: bool = False,
) -> Iterator[tuple[Consumer, Sums]]:
    """Means of the inputs of each product and of their squares, in the model as it is.

    `Sums.power` is that of what is read next: the output together with what is added to it.

    Args:
        analysis: Of the model.
        consumers: The products.
        feeds: Calibration data.
        folder: Where pieces of the model are written for ONNX Runtime.
        centred: Whether squares are those of distances from the mean where a product has a bias,
            which makes up for means.

    Raises:
        ModelError: The model does not run, or inputs are not finite.
    """
    wanted = [consumer.wanted for consumer in consumers]
    chain = Chain(analysis.model, list(feeds), wanted, folder)
    for consumer in _ordered(chain, consumers):
        weight, bias = _dense(consumer)
        seen, held = Sums(weight.shape[1], 0), Sums(weight.shape[1], 0)
        for number, values in enumerate(chain.advance(consumer.wanted)):
            x = consumer.vectors(values[consumer.reads])
            for part, own in _shares(len(feeds), number, len(x), (seen, held)):
                part.add(x[own], None)
            seen.power += _power(consumer, values, x.astype(np.float32) @ weight.T + bias)
        _check(consumer, seen, held)
        vectors = seen.count + held.count
        warn_of_few_vectors(consumer.name, vectors, weight.shape[1], "good fits")
        apart = len(feeds) >= 2 * HELD_OUT
        fixed = centred and consumer.bias is not None
        yield consumer, _together(weight, seen, held, apart=apart, centred=fixed)


def _together(weight: Array, seen: Sums, held: Sums, *, apart: bool, centred: bool) -> Sums:
    """Means over the data, with moments drawn to their diagonal where the data are few.

    Args:
        weight: float32 ``(rows, length)``.
        seen: Sums over calibration data.
        held: The same over data kept aside.
        apart: Whether losses are measured on the latter. They then take no part: a product of
            1,280 columns is fitted to 250 images without any error, be it right or wrong.
        centred: See `moments`.
    """
    few = seen.count < ANCHORED * weight.shape[1] and held.count > 0
    trial, other = seen.means(), held.means()
    if centred:
        mean = trial.mean
        trial.gram, other.gram = trial.moments_about(mean), other.moments_about(mean)
    share = temper(weight.astype(np.float64), trial, other, apart=apart)
    kept = held.means() if few else None
    if apart or few:
        seen.power *= seen.count / max(1, seen.count + held.count)
    else:
        seen.gram += held.gram
        seen.mean += held.mean
        seen.count += held.count
    found = seen.means()
    if centred:
        found.gram = found.moments_about(found.mean)
    found.gram, found.held = tempered(found.gram, share), kept
    return found


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
        return weight, consumer.offsets(consumer.bias.const_value.numpy()).astype(np.float32)
    return weight, np.zeros(len(weight), np.float32)


class Collector:
    """The model on its way to less: each product is seen behind the ones already fitted.

    Args:
        analysis: Of the model.
        items: Products and normalisations that read something else than in the dense model.
        gone: Which classes go.
        feeds: Calibration data.
        folder: Where segments are written.

    Attributes:
        items: The same in the order in which they are to be observed.
    """

    def __init__(
        self,
        analysis: Analysis,
        items: Sequence[Consumer | Depthwise | Norm],
        gone: Array,
        feeds: Sequence[Feed],
        folder: Path | None = None,
    ) -> None:
        wanted = [item.wanted for item in items]
        self._feeds = list(feeds)
        self._chain = Chain(analysis.model, self._feeds, wanted, folder)
        self._dense = Chain(analysis.model, self._feeds, wanted, folder)
        self.items = _ordered(self._chain, items)
        own = {item.weight.name or "" for item in items if isinstance(item, Consumer)}
        masked = masked_members(analysis, gone, own)
        for name, array in silenced(analysis, gone, masked).items():
            self._chain.replace(name, array)

    def replace(self, name: str, array: Array) -> None:
        """Put another initializer in the place of one for all that comes later."""
        self._chain.replace(name, array)

    def observe(self, consumer: Consumer) -> tuple[Sums, Sums]:
        """What a product reads and should make: means over calibration and over held-out data.

        Raises:
            ModelError: The model does not run, or inputs are not finite.
        """
        weight, bias = _dense(consumer)
        seen, held = (Sums(weight.shape[1], len(weight)) for _ in range(2))
        for number, (values, exact) in enumerate(self._values(consumer)):
            x = consumer.vectors(values[consumer.reads])
            target = consumer.vectors(exact[consumer.reads]).astype(np.float32) @ weight.T + bias
            shift = _shift(consumer, values, exact, len(x))
            if shift is not None and shift.shape == target.shape:
                target += shift
            for sums, part in _shares(len(self._feeds), number, len(x), (seen, held)):
                sums.add(x[part], target[part])
        _check(consumer, seen, held)
        return seen.means(), held.means()

    def channels(self, norm: Norm) -> tuple[ChannelSums, ChannelSums]:
        """What a normalisation reads, over calibration and over held-out data."""
        size = len(norm.statistics().mean)
        seen, held = ChannelSums(size), ChannelSums(size)
        for number, (values, exact) in enumerate(self._values(norm)):
            x, t = (norm.channels(of[norm.wanted[0]]) for of in (values, exact))
            for sums, part in _shares(len(self._feeds), number, x.shape[1], (seen, held)):
                sums.add(x[:, part], t[:, part])
        return seen, held

    def filters(self, item: Depthwise) -> tuple[FilterSums, FilterSums]:
        """What filters read and should make, over calibration and over held-out data."""
        exact_filters = item.stored().astype(np.float32)
        seen, held = FilterSums(exact_filters.shape), FilterSums(exact_filters.shape)
        for number, (values, exact) in enumerate(self._values(item)):
            x, t = (item.vectors(of[item.wanted[0]]) for of in (values, exact))
            target = t @ exact_filters.transpose(0, 2, 1)
            for sums, part in _shares(len(self._feeds), number, x.shape[1], (seen, held)):
                sums.add(x[:, part], target[:, part])
        return seen, held

    def _values(
        self, item: Consumer | Depthwise | Norm
    ) -> Iterator[tuple[Mapping[str, Array], ...]]:
        """What an item reads, of the model as it is and of the dense one."""
        return zip(self._chain.advance(item.wanted), self._dense.advance(item.wanted), strict=True)


def _shares(
    total: int, number: int, count: int, both: tuple[Kept, Kept]
) -> Iterator[tuple[Kept, slice]]:
    """Keep every tenth input back, or of a few inputs the last tenth of their vectors."""
    if total >= HELD_OUT:
        yield both[number % HELD_OUT == HELD_OUT - 1], slice(None)
        return
    cut = count - count // HELD_OUT
    yield both[0], slice(cut)
    yield both[1], slice(cut, None)


def _shift(
    consumer: Consumer, values: Mapping[str, Array], exact: Mapping[str, Array], count: int
) -> Array | None:
    """What the value added to the output has lost on the way: the product can make up for it."""
    if consumer.addend is None:
        return None
    name = consumer.addend.name or ""
    return consumer.outputs(exact[name].astype(np.float32) - values[name], count)


def masked_members(analysis: Analysis, gone: Array, but: set[str]) -> dict[str, Array]:
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
