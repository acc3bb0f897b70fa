"""Expected errors of settings, where a codec has to look at the weight for them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.passes.codecs.codec import Codec, MeasuredCodec, Params, WeightSite
from onnxcomp.passes.encode import not_finite
from onnxcomp.passes.menus import predicted
from onnxcomp.passes.sites import read_weight

__all__ = ["Estimates"]


class Estimates:
    """Errors that are expected of the weights of one model.

    Args:
        model: The canonical model; only read, one weight at a time.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def errors(self, codec: Codec, site: WeightSite, params: Sequence[Params]) -> Sequence[float]:
        """Relative Frobenius errors of a weight under some settings of a codec."""
        if not isinstance(codec, MeasuredCodec) or not params:
            return predicted(codec, site, params)
        weight = read_weight(self._model, site)
        if not_finite(weight):  # the encoder will say so
            return predicted(codec, site, params)
        return codec.measure(site, weight, params)
