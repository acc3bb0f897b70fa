"""What there is to choose from for a constant: its exact form, or the tensor as it is."""

from __future__ import annotations

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.planning.candidates import Candidate, Estimate
from onnxcomp.passes.planning.search_space import FRAMING, CandidateSet, keep
from onnxcomp.passes.weight import WeightSite

__all__ = ["exact_forms"]

_CODEC = "constant"


def exact_forms(site: WeightSite, policy: Policy) -> CandidateSet | None:
    """The candidates of a tensor that is known to be a constant; None for a weight.

    A rule that says how to store the tensor wins. Where everything is to stay dense, it stays.

    Args:
        site: The tensor.
        policy: What is asked of it.
    """
    ruled = policy.rule is not None and bool(policy.rule.methods or policy.rule.params)
    if site.constant is None or ruled:
        return None
    reason = site.constant.reason
    codec = CODECS[_CODEC]
    untouched = policy.methods == ("dense",) or site.rank is not None
    paying = [
        Candidate(site, _CODEC, params, size, 0.0, Estimate(0.0), reason)
        for params in ([] if untouched else codec.candidates(site))
        if (size := codec.size(site, params)) + FRAMING < site.nbytes
    ]
    # It loses nothing, however much the outputs depend on it.
    return CandidateSet(site, tuple(paying) or (keep(site, reason),), sensitivity=0.0, prior=0.0)
