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
from onnxcomp.passes.encoding.by_values import encode_by_values
from onnxcomp.passes.encoding.calibrated import Samples, encode_calibrated
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.kept_means import encode_with_means
from onnxcomp.passes.planning.candidates import Candidate, Choice
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, Feed, WeightSite

__all__ = ["TrialCodes"]

# Weights of models that are calibrated for a trial: some seconds.
_SMALL = 1 << 21

# Inputs that means of products are taken of.
_MEANS = 16


class TrialCodes:
    """The codes of one plan.

    Args:
        prepared: The model and its weights; only read.
        picks: The plan.
        empty: A plan without choices.
        samples: Inputs that weights will be encoded for; None where they are not.
        jobs: Threads of the encoders.
    """

    def __init__(
        self,
        prepared: Prepared,
        picks: Sequence[Candidate],
        empty: Plan,
        samples: Samples | None,
        jobs: int,
    ) -> None:
        self._prepared, self._jobs, self._samples = prepared, jobs, samples
        self._picks = {pick.site.name: pick for pick in picks if pick.codec != "dense"}
        small = sum(site.size for site in self.sites) <= _SMALL
        self._as_planned = samples is not None and small
        if samples is not None and small:
            found = encode_calibrated(
                prepared.model, self.sites, self._plan(empty), samples, self._encoded, jobs=jobs
            )
        else:
            model = prepared.model
            found = encode_with_means(
                model,
                [site for site in self.sites if offset_of(model, site) is not None],
                self._encoded,
                jobs=jobs,
                seed=empty.settings.seed,
                feeds=None if samples is None else _some(samples.feeds),
            )
        self._found = {encoded.site.name: encoded for encoded in found}

    @property
    def sites(self) -> list[WeightSite]:
        """Weights that the plan encodes."""
        return [site for site in self._prepared.sites if site.name in self._picks]

    def changes(self, sites: Sequence[WeightSite]) -> Iterator[dict[str, Array]]:
        """The initializers that differ, by name, weight by weight."""
        for site in sites:
            yield self._changed(self._found.get(site.name) or self._encoded(site))

    def _plan(self, empty: Plan) -> Plan:
        modes = self._prepared.policies
        choices = {name: Choice.of(pick, modes[name].mode) for name, pick in self._picks.items()}
        return dataclasses.replace(empty, choices=choices)

    def _encoded(self, site: WeightSite) -> EncodedWeight:
        choice = Choice.of(self._picks[site.name], self._prepared.policies[site.name].mode)
        return encode_by_values(self._prepared.model, site, choice, None, self._jobs)

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
        if self._as_planned or self._samples is None or calibration is None or not pick.error:
            return 1.0
        able = calibration.suits(pick.site, pick.params)
        return min(1.0, pick.harm / pick.error) if able else 1.0


def _some(feeds: Sequence[Feed]) -> Sequence[Feed]:
    """A few of the inputs, from all over them."""
    return feeds[:: -(-len(feeds) // _MEANS)]
