"""What there is to choose from for every weight of a model, with all that is expected of it."""

from __future__ import annotations

import dataclasses
import functools

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.ir.threads import in_threads
from onnxcomp.passes.planning.candidates import Estimator
from onnxcomp.passes.planning.error_model import Estimates
from onnxcomp.passes.planning.exact import exact_forms, exact_halves, with_rounding
from onnxcomp.passes.planning.families import with_families
from onnxcomp.passes.planning.measurements import Measurements
from onnxcomp.passes.planning.observed import observed
from onnxcomp.passes.planning.rank_goals import with_rank
from onnxcomp.passes.planning.search_space import CandidateSet, candidate_set, reads_all
from onnxcomp.passes.weight import Stats, WeightSite

__all__ = ["candidate_sets"]


def candidate_sets(
    prepared: Prepared, known: Measurements, *, threads: int = 1
) -> list[CandidateSet]:
    """What there is to choose from for every weight, in the order of the model.

    Args:
        prepared: The model, its weights and what is asked of each.
        known: What was measured before.
        threads: How many weights are looked at at once, where little of each is.

    Raises:
        UsageError: A rule names a parameter or a rank that no method of the weight has.
    """
    rounding = {} if known.timing is None else known.timing.rounding
    estimates = Estimates(
        prepared.model,
        calibrated=known.calibrated,
        timer=known.timing,
        rounding=rounding,
        sites=prepared.sites,
    )

    def candidates(item: tuple[WeightSite, Stats | None]) -> CandidateSet:
        site, stats = item
        estimates.look_at(stats)
        return _candidate_set(site, prepared, known, estimates)

    several = known.feeds is None and not reads_all(prepared.policies.values())
    made = in_threads(
        candidates,
        observed(prepared, known),
        threads if several else 1,
        what="planning",
        total=len(prepared.sites),
    )
    found = {own.site.name: own for own in made}
    sets = [dataclasses.replace(found[site.name], chance=known.chance) for site in prepared.sites]
    return with_families(sets)


def _candidate_set(
    site: WeightSite, prepared: Prepared, known: Measurements, estimates: Estimates
) -> CandidateSet:
    exact = exact_forms(site, prepared.policies[site.name])
    if exact is None:
        return _weight_set(site, prepared, known, estimates)
    if not any(option.codec == "constant" or option.codec == "dense" for option in exact.options):
        return exact
    return with_rounding(exact, _weight_set(site, prepared, known, estimates))


def _weight_set(
    site: WeightSite, prepared: Prepared, known: Measurements, estimates: Estimates
) -> CandidateSet:
    policy = with_rank(prepared.policies[site.name], site, estimates.energies)
    estimator: Estimator = estimates
    if policy.exact_half:
        estimator = functools.partial(exact_halves, estimates)
    # The curvature of the loss knows in which directions errors count, noise only how much.
    curved = estimates.loss if known.by_loss else None
    sensitivity = known.sensitivities.get(site.name) if curved is None else curved
    return candidate_set(
        site,
        policy,
        estimator=estimator,
        sensitivity=sensitivity,
        scale=known.scale.get(site.name),
        measured=known.measured.get(site.name),
        noise_scale=known.noise_scale.get(site.name),
        prior=known.prior[site.name],
    )
