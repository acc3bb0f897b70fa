"""What there is to choose from for a constant: its exact form, or the tensor as it is."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.settings import Rule, Settings
from onnxcomp.passes.planning.candidates import Candidate, Estimate
from onnxcomp.passes.planning.search_space import FRAMING, Menu, keep
from onnxcomp.passes.weight import WeightSite

__all__ = ["constant_menu"]

_CODEC = "constant"


def constant_menu(
    site: WeightSite, methods: Sequence[str], rule: Rule, settings: Settings
) -> Menu | None:
    """The menu of a tensor that is known to be a constant; None for weights.

    A rule that says how to store the tensor wins. Where everything is to stay dense, it stays.

    Args:
        site: The tensor.
        methods: Codecs of the run.
        rule: Settings for this tensor.
        settings: What is asked for.
    """
    if site.constant is None or rule.methods or rule.params:
        return None
    reason = site.constant.reason
    codec = CODECS[_CODEC]
    untouched = list(methods) == ["dense"] and settings.rest == "keep"
    offered = [] if untouched or site.rank is not None else codec.candidates(site)
    paying = [
        Candidate(site, _CODEC, params, size, 0.0, Estimate(0.0), reason)
        for params in offered
        if (size := codec.size(site, params)) + FRAMING < site.nbytes
    ]
    return Menu(site, tuple(paying) or (keep(site, reason),))
