"""Weights that workers of a cluster encode for their inputs.

The order of a calibrated run stays: weights that read the same values are encoded at the same time,
and what comes later waits for them. Moments of inputs lie in a file until all of those weights are
done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import CompressionError, ModelError
from onnxcomp.passes.analysis.offsets import Offset
from onnxcomp.passes.encoding.by_values import encode_matrix
from onnxcomp.passes.encoding.cluster_calls import Calls
from onnxcomp.passes.encoding.cluster_tasks import Answer, Batch, answer_of, begun, cache_of
from onnxcomp.passes.encoding.cluster_weights import Weights
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.fitting import fitted
from onnxcomp.passes.encoding.parcels import Parcel
from onnxcomp.passes.weight import Stats, WeightSite

__all__ = ["Fitting", "fit_weight"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """One weight to encode.

    Attributes:
        batch: The weight alone, and how workers go about it.
        stats: The `Stats` of its inputs.
        offset: The constant that is added to its products.
    """

    batch: Batch
    stats: Parcel
    offset: Offset | None


def fit_weight(task: _Task) -> Answer | CompressionError:
    """Encode a weight on a worker, on one thread: by its values, for its inputs, and compare.

    Returns:
        An answer, or what makes it impossible wherever it is tried.
    """
    batch = task.batch
    wrong = begun(batch)
    if wrong is not None:
        return wrong
    (item,) = batch.items
    try:
        plain = encode_matrix(
            item.matrix, item.site, item.choice, cache_of(batch), 1, compare=False
        )
        (stats,) = task.stats.opened()
        encoded = fitted(item.read, plain, stats, task.offset)
        return answer_of(encoded, batch.exchange)
    except ModelError as error:
        return error


class Fitting:
    """Encodes weights for their inputs on a cluster.

    Args:
        calls: Makes calls on the cluster.
        weights: Weights of the model.
        frame: How workers go about a weight.
        offsets: For each weight the constant that is added to its products, if there is one.
        progress: Told how many bytes of weights are done and not asked for yet.
    """

    def __init__(
        self,
        calls: Calls,
        weights: Weights,
        frame: Batch,
        offsets: Mapping[str, Offset | None],
        progress: Callable[[int, str], None] | None = None,
    ) -> None:
        self._calls, self._weights, self._frame = calls, weights, frame
        self._offsets, self._progress = offsets, progress

    def fit(
        self, sites: Sequence[WeightSite], stats: Stats
    ) -> Generator[EncodedWeight, None, None]:
        """Encode weights at the same time.

        Args:
            sites: Weights that read the same values.
            stats: Of these values.

        Yields:
            The weights in their order.

        Raises:
            UsageError: A worker has other versions.
            ModelError: A worker does not see the model's file.
            CompressionError: A weight cannot be encoded on the cluster, or the cluster is gone.
        """
        parcel = Parcel.packed(Path(self._frame.exchange.folder, "moments"), [stats])
        calls: dict[str, Any] = {}
        try:
            # The largest first, so that no worker is left with one in the end.
            for site in sorted(sites, key=lambda site: -site.size):
                batch = dataclasses.replace(self._frame, items=(self._weights.item(site),))
                task = _Task(batch, parcel, self._offsets.get(site.name))
                calls[site.name] = self._calls.call(fit_weight, task, [site.name])
            for number, site in enumerate(sites):
                while not self._calls.done(calls[site.name]):
                    self._tell(calls, sites[number:])
                    self._calls.wait()
                answer: Answer = self._calls.take(calls[site.name])
                self._weights.forget(site.name)
                yield self._weights.encoded(site, answer)
        finally:
            parcel.remove()

    def _tell(self, calls: Mapping[str, Any], sites: Sequence[WeightSite]) -> None:
        if self._progress is not None:
            done = (site.nbytes for site in sites if self._calls.done(calls[site.name]))
            self._progress(sum(done), self._calls.at_work)
