"""What is expected of settings: errors of weights and, where inputs are known, of their products.

A weight ``W (rows, length)`` with an error ``E`` adds ``tr(E G E^T)`` to the mean square of its
products, with the second moments ``G`` of their inputs. Errors of block formats are white within a
block and in proportion to its norm; feedback between blocks (GPTQ, LDLQ) leaves of ``G`` what a
block cannot have made good by the blocks after it: its Schur complement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import read_weight, stored_matrix
from onnxcomp.passes.codecs.moments import damped, energy, output_root
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec, RankGoals
from onnxcomp.passes.ir.tensors import not_finite
from onnxcomp.passes.planning.candidates import Estimate
from onnxcomp.passes.planning.search_space import predicted
from onnxcomp.passes.weight import Array, Stats, WeightSite

__all__ = ["Estimates", "Gains", "gains"]

# Weights that share a scale in block formats.
_BLOCK = 128

# What look-ups count for in the harm of a table that is multiplied, too: feedback does not help
# them. In SmolLM2 noise in the rows that are looked up makes 13 % of the divergence of both.
_LOOK_UPS = 0.13

# Seconds that one run takes longer with a setting than with the dense weight; None if not known.
Timer = Callable[[Codec, WeightSite, Params], float | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Gains:
    """What the inputs of a weight make of its errors.

    Attributes:
        white: Relative error of products over relative error of the weight, for block noise.
        feedback: What feedback between blocks leaves of it, 0 to 1.
        loss: What block noise as large as the weight would cost, by the curvature of the loss; None
            where that is not known.
    """

    white: float
    feedback: float
    loss: float | None = None


def gains(weight: Array, stats: Stats) -> Gains | None:
    """Gains for a weight ``(rows, length)``; None where its products are all zero.

    Where it is known what the loss feels of products, their errors count by that.
    """
    curved = stats.outputs is not None
    scales = np.diag(stats.outputs)[:, None] if stats.outputs is not None else np.ones((1, 1))
    seen = weight if stats.outputs is None else output_root(stats.outputs) @ weight
    power = energy(seen, stats.gram)
    moments = damped(stats)
    length = len(moments)
    # The last block in the order of encoding comes first in the factorisation.
    factor = np.linalg.cholesky(moments[::-1, ::-1])
    white = left = 0.0
    for start in range(0, length, _BLOCK):
        stop = min(length, start + _BLOCK)
        squares = scales * np.square(weight[:, start:stop], dtype=np.float64)
        norm = float(squares.sum()) / (stop - start)
        own = slice(length - stop, length - start)
        white += norm * float(np.trace(moments[start:stop, start:stop]))
        left += norm * float(np.square(factor[own, own]).sum())
    own_power = float(np.square(weight, dtype=np.float64).sum())
    if power <= 0.0 or white <= 0.0 or own_power <= 0.0:
        return None
    feedback = math.sqrt(min(1.0, left / white))
    return Gains(math.sqrt(white / power), feedback, white / 2 if curved else None)


class Estimates:
    """Expectations for the weights of one model; an `Estimator`.

    Args:
        model: The canonical model; only read, one weight at a time.
        calibrated: Whether weights will be encoded for their inputs where codecs can.
        timer: What settings cost in time.
        rounding: Relative error of the activations of each weight when they are rounded to 8 bits
            with one range, by name; where it is not known, nothing is lost.
        sites: All weights, for codecs by which several share a basis.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        calibrated: bool = False,
        timer: Timer | None = None,
        rounding: Mapping[str, float] | None = None,
        sites: Sequence[WeightSite] = (),
    ) -> None:
        self._model = model
        self._sites = {site.name: site for site in sites}
        self._calibrated = calibrated
        self._timer = timer
        self._rounding = rounding or {}
        self._stats: Stats | None = None
        self._gains: Gains | None = None
        self._seen: Gains | None = None

    def look_at(self, stats: Stats | None) -> None:
        """Use the inputs of one weight for its estimates, from now until the next call."""
        self._stats = stats
        self._gains = self._seen = None
        if stats is None:
            return
        weight = read_weight(self._model, stats.site)
        if not_finite(weight):
            return
        self._gains = gains(weight, dataclasses.replace(stats, outputs=None))
        # What the loss feels of errors, where that is known.
        self._seen = self._gains if stats.outputs is None else gains(weight, stats)

    @property
    def loss(self) -> float | None:
        """What noise as large as the weight would cost, by the curvature of the loss."""
        return None if self._seen is None else self._seen.loss

    def energies(self, ranks: RankGoals, site: WeightSite) -> Array:
        """Squared singular values of a weight; of its products where its inputs are known."""
        known = self._stats if self._stats is not None and self._stats.site == site else None
        return ranks.energies(read_weight(self._model, site), known)

    def __call__(
        self, codec: Codec, site: WeightSite, params: Sequence[Params]
    ) -> Sequence[Estimate]:
        """What is expected of some settings of a codec for a weight."""
        found = self._errors(codec, site, params)
        if codec.rounds_inputs:
            found = [self._with_rounding(site, estimate) for estimate in found]
        if self._timer is None:
            return found
        times = [self._timer(codec, site, item) for item in params]
        return [dataclasses.replace(e, time=time) for e, time in zip(found, times, strict=True)]

    def _errors(self, codec: Codec, site: WeightSite, params: Sequence[Params]) -> list[Estimate]:
        stats, known, seen = self._stats, self._gains, self._seen
        if stats is None or known is None or seen is None or stats.site != site:
            return self._of_weight(codec, site, params)
        plain = [estimate.error for estimate in self._of_weight(codec, site, params)]
        alike = dataclasses.replace(stats, outputs=None)
        products = self._of_products(codec, params, plain, alike, known)
        if codec.bases is not None:
            seen = known  # outputs of a whole family are not known here
        felt = products if seen is known else self._of_products(codec, params, plain, stats, seen)
        # What a spectral codec loses of products is what calibration leaves. Feedback counts in its
        # harm all the same: ranks of a small language model that were chosen so lose 7 % less.
        left = [self._feedback(codec, site, item) for item in params]
        harms = [error * own / seen.white for error, own in zip(felt, left, strict=True)]
        if codec.spectrum is None:
            products = [product * own for product, own in zip(products, left, strict=True)]
        return [
            Estimate(error, product, harm)
            for error, product, harm in zip(plain, products, harms, strict=True)
        ]

    def _of_products(
        self,
        codec: Codec,
        params: Sequence[Params],
        plain: Sequence[float],
        stats: Stats,
        known: Gains,
    ) -> list[float]:
        """Relative errors of products, from those of the weight or from its values."""
        if codec.measure is None or not params:
            return [known.white * error for error in plain]
        return list(codec.measure(stats.site, self._looked_at(codec, stats.site), params, stats))

    def _with_rounding(self, site: WeightSite, estimate: Estimate) -> Estimate:
        """The estimate with noise in the activations, which is as bad as so much in the weight."""
        added = self._rounding.get(site.name, 0.0)
        harm = estimate.error if estimate.harm is None else estimate.harm
        product = estimate.output_error
        if product is not None and self._gains is not None:
            product = math.hypot(product, self._gains.white * added)
        return dataclasses.replace(estimate, output_error=product, harm=math.hypot(harm, added))

    def _feedback(self, codec: Codec, site: WeightSite, params: Params) -> float:
        able = codec.calibration is not None and codec.calibration.suits(site, params)
        if not self._calibrated or not self._gains or not able:
            return 1.0
        share = _LOOK_UPS if any(use.need == "gather" for use in site.uses) else 0.0
        return math.sqrt(share + (1.0 - share) * self._gains.feedback**2)

    def _of_weight(
        self, codec: Codec, site: WeightSite, params: Sequence[Params]
    ) -> list[Estimate]:
        if codec.measure is None or not params:
            return predicted(codec, site, params)
        weight = self._looked_at(codec, site)
        return [Estimate(error) for error in codec.measure(site, weight, params)]

    def _looked_at(self, codec: Codec, site: WeightSite) -> Array:
        """The weight for `Codec.measure`: in its own type where most of it is not looked at.

        Of a basis that several weights share all these have to be seen.
        """
        if codec.bases is None or site.family is None:
            return (stored_matrix if codec.measures_rows else read_weight)(self._model, site)
        members = [self._sites[name] for name in site.family.members if name in self._sites]
        return np.concatenate([read_weight(self._model, own) for own in members or [site]])
