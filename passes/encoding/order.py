"""In which order weights are encoded for their inputs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.offsets import Offset
from onnxcomp.passes.calibration.elsewhere import Elsewhere
from onnxcomp.passes.calibration.statistics import Calibration
from onnxcomp.passes.encoding.samples import Samples, calibration_of
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import WeightSite

__all__ = ["Order"]


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """In which order weights are encoded.

    Attributes:
        others: Those that are not observed.
        reasons: Why, for those that could be calibrated else.
        tables: Observes tables that are looked up as well as multiplied.
        products: Observes the others.
        facts: What bytes follow from, as JSON holds it.
    """

    others: list[WeightSite]
    reasons: dict[str, str]
    tables: Calibration
    products: Calibration
    facts: list[object]

    @classmethod
    def of(
        cls,
        model: ir.Model,
        work: Sequence[WeightSite],
        plan: Plan,
        samples: Samples,
        offsets: Mapping[str, Offset | None],
        jobs: int,
        folder: Path | None,
        elsewhere: Elsewhere | None,
    ) -> Order:
        """For some weights, see `encode_calibrated`."""
        found = {site.name: calibration_of(site, plan[site.name]) for site in work}
        able = [site for site in work if found[site.name] or offsets[site.name]]
        anchored = any(calibration.anchored for calibration in found.values() if calibration)
        reference = model if anchored and samples.sequential else None
        streams = [name for name, own in found.items() if own is not None and own.streams]
        tables = [site for site in able if samples.sequential and _looked_up(site)]
        observe = functools.partial(
            Calibration, model, samples.feeds, folder=folder, threads=jobs, elsewhere=elsewhere
        )
        others = [site for site in able if site not in tables]
        products = observe(others, reference=reference, streams=streams, grouped=True)
        first = observe(tables)
        reasons = {**products.reasons, **first.reasons}
        observed = {site.name for site in able} - set(reasons)
        names = [[site.name for site in group] for group in (*first.groups, *products.groups)]
        return cls(
            others=[site for site in work if site.name not in observed],
            reasons=reasons,
            tables=first,
            products=products,
            facts=[names, samples.sequential, reference is not None, streams],
        )

    def choices(self, plan: Plan) -> list[tuple[WeightSite, Choice]]:
        """All weights in order, and what the plan says about them."""
        groups = (*self.tables.groups, *self.products.groups)
        return [(site, plan[site.name]) for site in (*self.others, *itertools.chain(*groups))]


def _looked_up(site: WeightSite) -> bool:
    return any(use.need == "gather" for use in site.uses)
