"""What there is to choose from where nothing may be lost: of a constant, and in half precision.

A Fourier basis or a filter bank is an operand of products like a weight, and rounding it does what
rounding a weight does. It is kept bit for bit as long as that leaves the weights enough room; see
`with_rounding`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.config.policy import HALF, Policy
from onnxcomp.passes.planning.candidates import Candidate, Estimate, Estimator
from onnxcomp.passes.planning.search_space import FRAMING, CandidateSet, keep
from onnxcomp.passes.weight import WeightSite

__all__ = ["exact_forms", "exact_halves", "with_rounding"]

_CODEC = "constant"

# Fewest bits of a constant that is rounded: nobody trained it to bear less.
_BITS = 4

# What is said of one.
_ROUNDED = "{}; rounded for the sake of the size"


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


def with_rounding(exact: CandidateSet, weight: CandidateSet) -> CandidateSet:
    """The candidates of a constant, and those that it may have where the size asks for them.

    Args:
        exact: Of the constant.
        weight: Of the same tensor if it were a weight.
    """
    constant = exact.site.constant
    if constant is None or not constant.transform or exact.site.rank is not None:
        return exact
    reason = _ROUNDED.format(constant.reason.partition(";")[0])
    coarse = [
        dataclasses.replace(own, reason=reason)
        for own in weight.options
        if own.codec != "dense" and _bits(own) >= _BITS
    ]
    if not coarse:
        return exact
    return dataclasses.replace(exact, rounded=weight.with_options((*exact.options, *coarse)))


def _bits(candidate: Candidate) -> float:
    """Bits per weight; 0 where settings are not counted in bits."""
    width = CODECS[candidate.codec].width
    return 0 if width is None else float(getattr(candidate.params, width))


def exact_halves(
    estimator: Estimator, codec: Codec, site: WeightSite, params: Sequence[Params]
) -> Sequence[Estimate]:
    """An estimator that allows half precision only where no value changes."""
    found = estimator(codec, site, params)
    if codec.name != HALF:
        return found
    return [e if e.error == 0.0 else dataclasses.replace(e, error=math.inf) for e in found]
