"""What a plan would lose, before it is carried out: its codes on a few inputs.

Weights are encoded by their values, which takes a second for a hundred million of them. Where they
will be calibrated, the errors of these codes are made smaller by what calibration is expected to
take off. Means of products are kept as the encoder keeps them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import offset_of, shifted
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.output_difference import OutputDifference
from onnxcomp.passes.calibration.paired_run import paired_difference
from onnxcomp.passes.calibration.perturbation import typed
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.encoding.by_values import encode_by_values
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.kept_means import encode_with_means
from onnxcomp.passes.planning.candidates import Candidate, Choice
from onnxcomp.passes.weight import Array, Feed, WeightSite

__all__ = ["Rehearsal"]

log = logging.getLogger(__name__)


class Rehearsal:
    """Measures plans of one model.

    Args:
        prepared: The model and its weights; only read.
        feeds: Inputs by name.
        calibrated: Whether weights will be encoded for their inputs where codecs can.
        jobs: Threads of the encoders.
        seed: Of pictures that are made up where weights are not calibrated.
    """

    def __init__(
        self,
        prepared: Prepared,
        feeds: Sequence[Feed],
        *,
        calibrated: bool,
        jobs: int = 1,
        seed: int = 0,
    ) -> None:
        self._prepared, self._feeds = prepared, feeds
        self._calibrated, self._jobs, self._seed = calibrated, jobs, seed

    def __call__(self, picks: Sequence[Candidate]) -> OutputDifference | None:
        """What outputs lose with a plan; None where that cannot be measured."""
        chosen = {pick.site.name: pick for pick in picks if pick.codec != "dense"}
        try:
            shifted_weights = self._with_means(chosen)

            def changes(sites: Sequence[WeightSite]) -> Iterator[Mapping[str, Array]]:
                for site in sites:
                    if site.name in chosen:
                        encoded = shifted_weights.get(site.name) or self._encoded(chosen[site.name])
                        yield self._changed(chosen[site.name], encoded)

            sites = [site for site in self._prepared.sites if site.name in chosen]
            found = paired_difference(self._prepared.model, sites, self._feeds, changes)
            found.mean()  # says so where no output says anything
        except ModelError as error:
            log.info("plans are not compared: %s", error.message)
            return None
        return found

    def _encoded(self, pick: Candidate) -> EncodedWeight:
        choice = Choice.of(pick, self._prepared.policies[pick.site.name].mode)
        return encode_by_values(self._prepared.model, pick.site, choice, None, self._jobs)

    def _with_means(self, chosen: Mapping[str, Candidate]) -> dict[str, EncodedWeight]:
        """Weights whose products have an offset, with its shift."""
        model = self._prepared.model
        able = [pick.site for pick in chosen.values() if offset_of(model, pick.site) is not None]
        found = encode_with_means(
            model,
            able,
            lambda site: self._encoded(chosen[site.name]),
            jobs=self._jobs,
            seed=self._seed,
            feeds=self._feeds if self._calibrated else None,
        )
        return {encoded.site.name: encoded for encoded in found}

    def _changed(self, pick: Candidate, encoded: EncodedWeight) -> dict[str, Array]:
        """The initializers that differ."""
        if encoded.payload is None:
            return {}
        site, model = pick.site, self._prepared.model
        weight = read_weight(model, site)
        decoded = CODECS[pick.codec].decode(site, encoded.payload)
        left = self._left(pick)
        if left < 1.0:
            decoded = weight + np.float32(left) * (decoded - weight)
        found = {site.name: typed(site, decoded)}
        if encoded.shift is not None:
            shift = dataclasses.replace(encoded.shift, change=left * encoded.shift.change)
            found[shift.name] = shifted(model, shift).numpy()
        return found

    def _left(self, pick: Candidate) -> float:
        """What calibration is expected to leave of the error of a weight, 0 to 1."""
        calibration = CODECS[pick.codec].calibration
        if not self._calibrated or calibration is None or not pick.error:
            return 1.0
        able = calibration.suits(pick.site, pick.params)
        return min(1.0, pick.harm / pick.error) if able else 1.0
