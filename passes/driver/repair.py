"""Another plan for a model whose outputs differ too much: weights that cause it become dense."""

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

# Inputs for the bisection.
_FEEDS = 4

# What is aimed at, of an error that must not be exceeded.
_MARGIN = 0.95

# An output that is fast enough is small enough where one this much smaller was too slow.
_CLOSE = 1.05

# Share of the weight bytes that may become dense again, and share of the weights above which the
# plan is the cause and no single weight.
_MOST, _FEW = 0.5, 0.2


class _Paces:
    """Expected slowdowns that plans are made for, by what was measured of the ones before.

    Attributes:
        now: The last one; None before the first.
    """

    def __init__(self) -> None:
        self.now: float | None = None
        self._fast: tuple[float, int] | None = None  # pace and bytes of what was fast enough
        self._slow: tuple[float, int] | None = None

    def next(self, measured: Slowdown, size: int) -> float | None:
        """The next one to plan for; None where the last output is about as small as can be."""
        pace = measured.max_slowdown if self.now is None else self.now
        if measured.passed:
            self._fast = (pace, size)
        else:
            self._slow = (pace, size)
        if self._fast is None:
            self.now = pace * (measured.max_slowdown / measured.factor) * _MARGIN
        elif self._slow is None or self._fast[1] <= _CLOSE * self._slow[1]:
            return None
        else:
            self.now = (self._fast[0] + self._slow[0]) / 2
        return self.now


class Repair:
    """Makes plans from what was wrong with earlier ones.

    Args:
        prepared: The model and its weights; only read.
        sets: What there was to choose from; None where the plan was given.
        name: File name of the output.
        timing: What settings cost in time.
        free: Whether the output may become as large as its error needs.
    """

    def __init__(
        self,
        prepared: Prepared,
        sets: Sequence[CandidateSet] | None,
        name: str = "out.onnx",
        *,
        timing: Timing | None = None,
        free: bool = False,
    ) -> None:
        self._prepared, self._name = prepared, name
        self._candidates = None if sets is None else list(sets)
        self._timing, self._free = timing, free
        self._paces = _Paces()

    def plan(
        self,
        made: Plan,
        compressed: Path,
        feeds: Sequence[Feed] | None,
        *,
        error: float,
        wanted: float,
        below: int | None = None,
    ) -> Plan | None:
        """The next plan to try, with some weights dense; None where that is of no use.

        Args:
            made: The plan that failed.
            compressed: The model made by it.
            feeds: Real inputs; None to make some up.
            error: Measured relative error of the worst output.
            wanted: Largest accepted one.
            below: Bytes of another plan that would do; None where there is none.
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
        if not blamed or (self._free and len(blamed) > max(1, _FEW * len(sites))):
            return None
        log.info("these weights cause the error: %s", ", ".join(site.name for site in blamed))
        reason = f"rolled back: outputs differed by {error:.3g}, {wanted:.3g} are allowed"
        return self._without(made, {site.name for site in blamed}, reason, below)

    def within(self, made: Plan, size: int) -> Plan:
        """The best plan for an output of at most `size` bytes; the smallest where none fits."""
        settings = dataclasses.replace(
            made.settings, bits=None, ratio=None, max_error=None, target_size=size
        )
        return self._planned(made, settings)

    def paced(self, made: Plan, measured: Slowdown) -> Plan | None:
        """A plan that is expected to be just fast enough.

        None where the plan was given, and there is nothing else to choose from, and where nothing
        smaller is expected to be fast enough.

        Args:
            made: The plan whose output was timed.
            measured: Its times.
        """
        if self._candidates is None or self._timing is None:
            return None
        pace = self._paces.next(measured, made.bytes or 0)
        return None if pace is None else self._planned(made, made.settings)

    def _planned(self, made: Plan, settings: Settings) -> Plan:
        """A plan for other settings than those that were asked for."""
        assert self._candidates is not None
        if self._paces.now is not None:
            settings = dataclasses.replace(settings, max_slowdown=self._paces.now)
        found = plan_from(
            self._candidates, self._prepared, settings, name=self._name, timing=self._timing
        )
        return dataclasses.replace(found, settings=made.settings, budget=made.budget)

    def _without(self, made: Plan, names: set[str], reason: str, below: int | None) -> Plan | None:
        """A plan in which some weights are dense, and the budget goes to the others."""
        if self._candidates is not None:
            before = self._candidates
            self._candidates = [
                candidates.with_options([keep(candidates.site, reason)])
                if candidates.site.name in names
                else candidates
                for candidates in before
            ]
            found = self._planned(made, made.settings)
            if below is None or (found.bytes or 0) < below:
                return found
            self._candidates = before
            return None
        sites = {site.name: site for site in self._prepared.sites}
        choices = dict(made.choices)
        choices.update({name: Choice.untouched(sites[name], reason) for name in names})
        changed = dataclasses.replace(made, choices=choices)
        return settle(changed, self._prepared, name=self._name)
