"""Keep means of the products of convolutions without data, on pictures that were made up.

What a code changes of a weight is known, ``W' - W``; what its inputs are in the mean is known well
enough from made-up pictures. The change of a product's mean is the product of the two, and the
bias takes it back.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import Offset, offset_of
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.made_up_pictures import made_up_pictures
from onnxcomp.passes.calibration.statistics import Calibration
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.moments import mean_shift
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.weight import Feed, Stats, WeightSite

__all__ = ["encode_with_means"]

log = logging.getLogger(__name__)


def encode_with_means(
    model: ir.Model,
    work: Sequence[WeightSite],
    plain: Callable[[WeightSite], EncodedWeight],
    *,
    seed: int = 0,
    folder: Path | None = None,
    feeds: Sequence[Feed] | None = None,
) -> Iterator[EncodedWeight]:
    """Encode weights, and shift the offsets of their products where the model reads pictures.

    Args:
        model: The canonical model; only read.
        work: Weights to encode.
        plain: Encodes one of them by its values.
        seed: Of the pictures.
        folder: Where temporary files lie.
        feeds: Real inputs in the place of the pictures.
    """
    offsets = {site.name: offset for site in work if (offset := offset_of(model, site))}
    able = [site for site in work if site.name in offsets]
    pictures = made_up_pictures(model, seed=seed) if able and feeds is None else feeds
    left = {site.name: site for site in work}
    if able and pictures is not None:
        seen = Calibration(model, pictures, able, grouped=True, means=True, folder=folder)
        try:
            for group, stats in seen:
                for site in group:
                    encoded = plain(left.pop(site.name))
                    yield _shifted(model, encoded, stats, offsets[site.name])
        except ModelError as error:
            log.info("means of products are not kept: %s", error.message)
    for site in list(left.values()):
        yield plain(site)


def _shifted(
    model: ir.Model, encoded: EncodedWeight, stats: Stats, offset: Offset
) -> EncodedWeight:
    """A weight with the shift that keeps the means of its products."""
    if encoded.payload is None:
        return encoded
    decoded = CODECS[encoded.choice.codec].decode(encoded.site, encoded.payload)
    change = mean_shift(read_weight(model, encoded.site), decoded, stats)
    if change is None or not np.isfinite(change).all():
        return encoded
    return dataclasses.replace(encoded, shift=offset.shift(change))
