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

# Weights of models that are calibrated for a trial: some seconds. There is time for more of the
# plan that was chosen.
_SMALL, _CHOSEN = 1 << 21, 1 << 23


class Rehearsal:
    """Measures plans of one model.

    Args:
        prepared: The model and its weights; only read.
        settings: What is asked for.
        feeds: Inputs by name, to judge by.
        all_feeds: Those of which `feeds` are some, for `longer`; None for no others.
        samples: Others that weights are encoded for; None where they are encoded by their values.
        jobs: Threads of the encoders.
    """

    def __init__(
        self,
        prepared: Prepared,
        settings: Settings,
        feeds: Sequence[Feed],
        *,
        all_feeds: Sequence[Feed] | None = None,
        samples: Samples | None = None,
        jobs: int = 1,
    ) -> None:
        self._all = feeds if all_feeds is None else all_feeds
        self._prepared, self._feeds, self._samples, self._jobs = prepared, feeds, samples, jobs
        self._empty = Plan(prepared.source, settings, Budget(), {})

    @property
    def estimates(self) -> bool:
        """Whether weights are too many to be calibrated: what it would gain is estimated."""
        weights = sum(site.size for site in self._prepared.sites)
        return self._samples is not None and weights > _SMALL

    def __call__(self, picks: Sequence[Candidate]) -> OutputDifference | None:
        """What outputs lose with a plan; None where that cannot be measured."""
        return self._measured(picks, self._feeds, _SMALL)

    def longer(self, picks: Sequence[Candidate], count: int) -> OutputDifference | None:
        """The same on so many of all inputs, from all over them, if there are as many.

        Weights of models that are not very large are calibrated.
        """
        count = min(count, len(self._all))
        feeds = [self._all[n * len(self._all) // count] for n in range(count)]
        return self._measured(picks, feeds, _CHOSEN)

    def _measured(
        self, picks: Sequence[Candidate], feeds: Sequence[Feed], most: int
    ) -> OutputDifference | None:
        """What outputs lose; at most so many weights are calibrated, and none of more."""
        model = self._prepared.model
        try:
            codes = TrialCodes(
                self._prepared,
                picks,
                calibrated=self._samples is not None,
                encoded=self._as_planned(picks, most),
                feeds=None if self._samples is None else self._samples.feeds,
                seed=self._empty.settings.seed,
                jobs=self._jobs,
            )
            found = paired_difference(model, codes.sites, feeds, codes.changes)
            found.mean()  # says so where no output says anything
        except ModelError as error:
            log.info("plans are not compared: %s", error.message)
            return None
        return found

    def _as_planned(self, picks: Sequence[Candidate], most: int) -> list[EncodedWeight] | None:
        """The weights of a model as they will be calibrated; None where they are more."""
        size = sum(pick.site.size for pick in picks if pick.codec != "dense")
        if self._samples is None or size > most:
            return None
        policies = self._prepared.policies
        choices = {p.site.name: Choice.of(p, policies[p.site.name].mode) for p in picks}
        plan = dataclasses.replace(self._empty, choices=choices)
        prepared = self._prepared
        return encode(prepared.model, prepared.sites, plan, jobs=self._jobs, samples=self._samples)
