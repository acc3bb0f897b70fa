"""Another plan for a model whose outputs differ too much: weights to blame become dense again."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.perturbation import Probe, made_up_inputs
from onnxcomp.passes.calibration.sensitivity import spread
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.latency.measure import Slowdown
from onnxcomp.passes.latency.model import Timing
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.planning.planner import plan_from, settle
from onnxcomp.passes.planning.search_space import CandidateSet, keep
from onnxcomp.passes.verification.bisect import blame, decoded_weights
from onnxcomp.passes.weight import Feed, WeightSite

__all__ = ["Repair"]

log = logging.getLogger(__name__)

# Inputs that blame is found with.
_FEEDS = 4

# What is aimed at, of an error that must not be exceeded.
_MARGIN = 0.95

# Share of the weight bytes that may become dense again, and share of the weights above which it is
# no weight that is to blame, but the plan.
_MOST, _FEW = 0.5, 0.2


class Repair:
    """Makes plans from what was wrong with earlier ones.

    Args:
        prepared: The model and its weights; only read.
        sets: What there was to choose from; None where the plan was given.
        name: File name of the output.
        timing: What settings cost in time.
    """

    def __init__(
        self,
        prepared: Prepared,
        sets: Sequence[CandidateSet] | None,
        name: str = "out.onnx",
        *,
        timing: Timing | None = None,
    ) -> None:
        self._prepared, self._name = prepared, name
        self._candidates = None if sets is None else list(sets)
        self._aim: float | None = None
        self._timing = timing
        self._pace: float | None = None

    def plan(
        self,
        made: Plan,
        compressed: Path,
        feeds: Sequence[Feed] | None,
        *,
        error: float,
        wanted: float,
    ) -> Plan | None:
        """The next plan to try; None where none is in sight.

        Args:
            made: The plan that failed.
            compressed: The model made by it.
            feeds: Real inputs; None to make some up.
            error: Measured relative error of the worst output.
            wanted: Largest accepted one.
        """
        feeds = made_up_inputs(self._prepared.model) if feeds is None else spread(feeds, _FEEDS)
        decoded = decoded_weights(compressed, self._prepared.sites)
        sites = list(decoded)
        with tempfile.TemporaryDirectory() as folder:
            probe = Probe(self._prepared.model, sites, feeds, Path(folder))

            def noise(chosen: Sequence[WeightSite]) -> float:
                return probe.noise({site: decoded[site] for site in chosen}, worst=True)

            # In proportion: these inputs are not those that the error was measured on.
            limit = noise(sites) * (_MARGIN * wanted / error) ** 2
            most = int(_MOST * sum(site.nbytes for site in self._prepared.sites))
            blamed = blame(noise, sites, limit, most)
        if self._free(made) and (blamed is None or len(blamed) > max(1, _FEW * len(sites))):
            return self._stricter(made, wanted / error)
        if not blamed:
            return None
        log.info("to blame: %s", ", ".join(site.name for site in blamed))
        reason = f"rolled back: outputs differed by {error:.3g}, {wanted:.3g} are allowed"
        return self._without(made, {site.name for site in blamed}, reason)

    def faster(self, made: Plan, measured: Slowdown) -> Plan | None:
        """A plan that is expected to be faster than one that was too slow.

        None where the plan was given, and there is nothing else to choose from.
        """
        if self._candidates is None or self._timing is None:
            return None
        pace = measured.max_slowdown if self._pace is None else self._pace
        self._pace = pace * (measured.max_slowdown / measured.factor) * _MARGIN
        settings = dataclasses.replace(made.settings, max_slowdown=self._pace)
        return self._planned(made, settings)

    def _planned(self, made: Plan, settings: Settings) -> Plan:
        """A plan for stricter settings than those that were asked for."""
        assert self._candidates is not None
        if self._aim is not None:
            settings = dataclasses.replace(settings, max_error=self._aim)
        if self._pace is not None:
            settings = dataclasses.replace(settings, max_slowdown=self._pace)
        found = plan_from(
            self._candidates, self._prepared, settings, name=self._name, timing=self._timing
        )
        return dataclasses.replace(found, settings=made.settings, budget=made.budget)

    def _free(self, made: Plan) -> bool:
        """Whether the plan may become as large as its error needs."""
        budget = made.budget
        return (
            self._candidates is not None
            and budget.max_error is not None
            and (budget.bytes is None and budget.bits is None)
        )

    def _stricter(self, made: Plan, factor: float) -> Plan | None:
        """A plan for a smaller expected error."""
        aim = made.budget.max_error if self._aim is None else self._aim
        assert aim is not None and self._candidates is not None
        if factor >= 1.0 or aim <= 0.0:
            return None
        self._aim = aim * factor * _MARGIN
        return self._planned(made, made.settings)

    def _without(self, made: Plan, names: set[str], reason: str) -> Plan:
        """A plan in which some weights are dense, and the budget goes to the others."""
        if self._candidates is not None:
            self._candidates = [
                candidates.with_options([keep(candidates.site, reason)])
                if candidates.site.name in names
                else candidates
                for candidates in self._candidates
            ]
            return self._planned(made, made.settings)
        sites = {site.name: site for site in self._prepared.sites}
        choices = dict(made.choices)
        choices.update({name: Choice.untouched(sites[name], reason) for name in names})
        changed = dataclasses.replace(made, choices=choices)
        return settle(changed, self._prepared, name=self._name)
