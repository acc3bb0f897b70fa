"""What a plan makes of weights, before it is carried out, in a fraction of the time.

Weights are encoded by their values, which takes a second for a hundred million of them. Where they
will be calibrated, small models are encoded as they will be; of larger ones, the errors of codes by
values are made smaller by what calibration is expected to take off. Means of products are kept as
the encoder keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from onnxcomp.passes.analysis.offsets import offset_of, shifted
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.perturbation import typed
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.encoding.bases import bound_codecs
from onnxcomp.passes.encoding.by_values import encode_by_values
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.kept_means import encode_with_means
from onnxcomp.passes.planning.candidates import Candidate, Choice
from onnxcomp.passes.weight import Array, Feed, WeightSite

__all__ = ["TrialCodes"]

# Inputs that means of products are taken of.
_MEANS = 16


class TrialCodes:
    """The codes of one plan.

    Args:
        prepared: The model and its weights; only read.
        picks: The plan.
        calibrated: Whether weights will be encoded for their inputs.
        encoded: Weights as they will be, where that is known.
        feeds: Inputs that means of products are kept on; None for pictures that are made up.
        seed: Of those.
        jobs: Threads of the encoders.
    """

    def __init__(
        self,
        prepared: Prepared,
        picks: Sequence[Candidate],
        *,
        calibrated: bool = False,
        encoded: Sequence[EncodedWeight] | None = None,
        feeds: Sequence[Feed] | None = None,
        seed: int = 0,
        jobs: int = 1,
    ) -> None:
        self._prepared, self._jobs = prepared, jobs
        self._picks = {pick.site.name: pick for pick in picks if pick.codec != "dense"}
        self._smaller = calibrated and encoded is None
        choices = {name: self._choice(name) for name in self._picks}
        self._codecs = {} if encoded else bound_codecs(prepared.model, self.sites, choices)
        if encoded is None:
            able = [site for site in self.sites if offset_of(prepared.model, site) is not None]
            some = None if feeds is None else feeds[:: -(-len(feeds) // _MEANS)]
            encoded = list(
                encode_with_means(prepared.model, able, self._encoded, seed=seed, feeds=some)
            )
        self._found = {one.site.name: one for one in encoded}

    @property
    def sites(self) -> list[WeightSite]:
        """Weights that the plan encodes."""
        return [site for site in self._prepared.sites if site.name in self._picks]

    def changes(self, sites: Sequence[WeightSite]) -> Iterator[dict[str, Array]]:
        """The initializers that differ, by name, weight by weight."""
        for site in sites:
            yield self._changed(self._found.get(site.name) or self._encoded(site))

    def _encoded(self, site: WeightSite) -> EncodedWeight:
        choice, codec = self._choice(site.name), self._codecs.get(site.name)
        return encode_by_values(self._prepared.model, site, choice, None, self._jobs, codec=codec)

    def _choice(self, name: str) -> Choice:
        return Choice.of(self._picks[name], self._prepared.policies[name].mode)

    def _changed(self, encoded: EncodedWeight) -> dict[str, Array]:
        if encoded.payload is None:
            return {}
        site, model = encoded.site, self._prepared.model
        decoded = CODECS[encoded.choice.codec].decode(site, encoded.payload)
        left = self._left(self._picks[site.name])
        if left < 1.0:
            weight = read_weight(model, site)
            decoded = weight + np.float32(left) * (decoded - weight)
        found = {site.name: typed(site, decoded)}
        if encoded.shift is not None:
            shift = dataclasses.replace(encoded.shift, change=left * encoded.shift.change)
            found[shift.name] = shifted(model, shift).numpy()
        return found

    def _left(self, pick: Candidate) -> float:
        """What calibration is expected to leave of the error of codes by values, 0 to 1."""
        calibration = CODECS[pick.codec].calibration
        if not self._smaller or calibration is None or not pick.error:
            return 1.0
        able = calibration.suits(pick.site, pick.params)
        return min(1.0, pick.harm / pick.error) if able else 1.0
