"""Encode tables whose rows are only looked up for what the loss feels of these rows.

Such a table has no products, so nothing that it reads says which of its errors matter. What the
model does with the rows says so: an error ``e`` of a row costs ``e^T H e``, with the curvature H of
the loss by what is looked up. H is one matrix for all rows, those that no input has looked up as
well; codecs that keep errors of products small take it in the place of second moments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.sensitivity import small_pieces
from onnxcomp.passes.calibration.statistics import HELD_OUT
from onnxcomp.passes.codecs.moments import with_weight_error
from onnxcomp.passes.encoding.dense_fallback import with_fallback
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.fitting import fitted
from onnxcomp.passes.encoding.samples import Samples, calibration_of
from onnxcomp.passes.gradients.output_moments import Curvature, look_up_moments
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, Feed, HeldMoments, Stats, WeightSite

__all__ = ["LookUps"]

# Inputs that the curvature is taken from, evenly from all, and indices in them that are enough
# beyond the fewest inputs; a pass back costs three runs. Fewer inputs than these are cut.
_MOST, _FEWEST = 128, 32
_INDICES = 8192


class LookUps:
    """Tables whose rows are only looked up; the model is run when the first one is encoded.

    Args:
        model: The canonical dense model; only read.
        work: Weights of any kind.
        plan: Decisions for them.
        samples: Calibration inputs.
        folder: Where temporary files lie.
    """

    def __init__(
        self,
        model: ir.Model,
        work: Sequence[WeightSite],
        plan: Plan,
        samples: Samples,
        folder: Path | None = None,
    ) -> None:
        self._model, self._folder = model, folder
        self._feeds = _evenly(model, samples.feeds)
        self._tables = [
            site
            for site in work
            if all(use.need == "gather" for use in site.uses)
            and calibration_of(site, plan[site.name]) is not None
        ]

    @functools.cached_property
    def _curvature(self) -> Sequence[Mapping[str, Curvature]]:
        """By name, of inputs to encode for and of inputs to judge by."""
        held = self._feeds[HELD_OUT - 1 :: HELD_OUT]
        used = [feed for n, feed in enumerate(self._feeds) if n % HELD_OUT != HELD_OUT - 1]
        return look_up_moments(self._model, self._tables, [used, held], folder=self._folder)

    def encoded(
        self, read: Callable[[], Array], plain: EncodedWeight, reason: str, *, threads: int = 1
    ) -> EncodedWeight:
        """A weight without products to observe: for its look-ups where it has any, else plainly.

        Args:
            read: Gives its canonical matrix ``(rows, length)``.
            plain: The weight encoded by its values.
            reason: Why it has no products to observe.
            threads: Threads of the encoder.
        """
        found = self._fitted(read, plain, threads)
        if found is not None:
            return found
        plain = dataclasses.replace(plain, note=f"not calibrated: {reason}" if reason else "")
        return with_fallback(plain, read, threads=threads)

    def _fitted(
        self, read: Callable[[], Array], plain: EncodedWeight, threads: int
    ) -> EncodedWeight | None:
        """The better form of a table; None for others, and where the curvature is not known."""
        site = plain.site
        if site not in self._tables or len(self._feeds) < HELD_OUT:
            return None
        used, held = (part.get(site.name) for part in self._curvature)
        if used is None or held is None:
            return None
        weight = read()
        stats = Stats(
            site,
            tokens=used.vectors,
            gram=with_weight_error(used.moments, weight).astype(np.float32),
            mean=np.zeros(site.length),
            held=HeldMoments(with_weight_error(held.moments, weight)),
        )
        found = fitted(lambda: weight, plain, stats, None, threads=threads)
        return dataclasses.replace(found, output_error=None)  # it has no products


def _evenly(model: ir.Model, feeds: Sequence[Feed]) -> Sequence[Feed]:
    """As many inputs as suffice, by the size of the first one."""
    if 0 < len(feeds) < _FEWEST:
        feeds = small_pieces(model, feeds, _INDICES // _FEWEST)
    sizes = [array.size for array in feeds[0].values()] if feeds else []
    enough = min(_MOST, max(_FEWEST, -(-_INDICES // max([1, *sizes]))))
    return feeds[:: -(-len(feeds) // enough)]
