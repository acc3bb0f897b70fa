"""What a plan would lose: its codes on a few inputs, before it is carried out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.output_difference import OutputDifference
from onnxcomp.passes.calibration.paired_run import paired_difference
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.encoding.calibrated import Samples
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.encoder import encode
from onnxcomp.passes.encoding.trial_codes import TrialCodes
from onnxcomp.passes.planning.candidates import Candidate, Choice
from onnxcomp.passes.planning.plan import Budget, Plan
from onnxcomp.passes.weight import Feed

__all__ = ["Rehearsal"]

log = logging.getLogger(__name__)

# Weights of models that are calibrated for a trial: some seconds.
_SMALL = 1 << 21


class Rehearsal:
    """Measures plans of one model.

    Args:
        prepared: The model and its weights; only read.
        settings: What is asked for.
        feeds: Inputs by name, to judge by.
        samples: Others that weights are encoded for; None where they are encoded by their values.
        jobs: Threads of the encoders.
    """

    def __init__(
        self,
        prepared: Prepared,
        settings: Settings,
        feeds: Sequence[Feed],
        *,
        samples: Samples | None = None,
        jobs: int = 1,
    ) -> None:
        self._prepared, self._feeds, self._samples, self._jobs = prepared, feeds, samples, jobs
        self._empty = Plan(prepared.source, settings, Budget(), {})

    @property
    def estimates(self) -> bool:
        """Whether weights are too many to be calibrated: what it would gain is estimated."""
        weights = sum(site.size for site in self._prepared.sites)
        return self._samples is not None and weights > _SMALL

    def __call__(self, picks: Sequence[Candidate]) -> OutputDifference | None:
        """What outputs lose with a plan; None where that cannot be measured."""
        model = self._prepared.model
        try:
            codes = TrialCodes(
                self._prepared,
                picks,
                calibrated=self._samples is not None,
                encoded=self._as_planned(picks),
                feeds=None if self._samples is None else self._samples.feeds,
                seed=self._empty.settings.seed,
                jobs=self._jobs,
            )
            found = paired_difference(model, codes.sites, self._feeds, codes.changes)
            found.mean()  # says so where no output says anything
        except ModelError as error:
            log.info("plans are not compared: %s", error.message)
            return None
        return found

    def _as_planned(self, picks: Sequence[Candidate]) -> list[EncodedWeight] | None:
        """The weights of a small model as they will be calibrated; None for others."""
        size = sum(pick.site.size for pick in picks if pick.codec != "dense")
        if self._samples is None or size > _SMALL:
            return None
        policies = self._prepared.policies
        choices = {p.site.name: Choice.of(p, policies[p.site.name].mode) for p in picks}
        plan = dataclasses.replace(self._empty, choices=choices)
        prepared = self._prepared
        return encode(prepared.model, prepared.sites, plan, jobs=self._jobs, samples=self._samples)
