"""Bases that weights of a plan share, found before any weight is encoded.

With inputs they are found for what the dense model feeds all weights that share one; each weight's
own factor is fitted later, behind the compressed weights before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.statistics import Calibration
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.bases import BasisSums
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.encoding.samples import Codecs, Samples, curvature_for
from onnxcomp.passes.ir.tensors import not_finite
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Stats, WeightSite

__all__ = ["bound_codecs", "shares"]


def shares(choice: Choice) -> bool:
    """Whether a weight is stored with what may belong to others, too: no cache can hold that."""
    return CODECS[choice.codec].bases is not None


def bound_codecs(
    model: ir.Model,
    sites: Sequence[WeightSite],
    choices: Mapping[str, Choice],
    samples: Samples | None = None,
    folder: Path | None = None,
) -> Codecs:
    """The codecs of weights that share bases, with these, by name of the weight.

    Args:
        model: The canonical model; only read.
        sites: Weights to encode.
        choices: Decisions for them, by name.
        samples: Calibration inputs; None to look at values alone.
        folder: Where temporary files lie.

    Raises:
        ModelError: The model does not run on the inputs, or gives NaN.
    """
    keys: dict[str, str] = {}
    for site in sites:
        bases = CODECS[choices[site.name].codec].bases
        if bases is not None and not not_finite(read_weight(model, site)):
            keys[site.name] = bases.key(site, choices[site.name].params)
    members = [site for site in sites if list(keys.values()).count(keys.get(site.name, "")) > 1]
    if not members:
        return {}
    sums: dict[str, BasisSums] = {}
    for site, stats in _observed(model, members, choices, samples, folder):
        bases = CODECS[choices[site.name].codec].bases
        assert bases is not None
        total = sums.setdefault(keys[site.name], bases.sums(site.length))
        total.add(read_weight(model, site), stats)
    return _bound(members, choices, keys, sums)


def _bound(
    members: Sequence[WeightSite],
    choices: Mapping[str, Choice],
    keys: Mapping[str, str],
    sums: Mapping[str, BasisSums],
) -> dict[str, Codec]:
    """A codec for each key, given to all weights that have it."""
    found: dict[str, Codec] = {}
    for site in members:
        choice, key = choices[site.name], keys[site.name]
        bases = CODECS[choice.codec].bases
        if bases is not None and key not in found:
            found[key] = bases.bound(sums[key].basis(bases.rank(choice.params)))
    return {site.name: found[keys[site.name]] for site in members}


def _observed(
    model: ir.Model,
    members: Sequence[WeightSite],
    choices: Mapping[str, Choice],
    samples: Samples | None,
    folder: Path | None,
) -> Iterator[tuple[WeightSite, Stats | None]]:
    """The weights with their inputs in the dense model, where all of a basis are known."""
    if samples is None:
        yield from ((site, None) for site in members)
        return
    calibration = Calibration(model, samples.feeds, members, folder=folder)
    if calibration.reasons:
        yield from ((site, None) for site in members)
        return
    work = {site: choices[site.name] for site in members}
    curvature = curvature_for(model, work, samples, folder)
    if len(curvature) < len(members):
        curvature = {}
    for group, stats in calibration:
        for site in group:
            yield (
                site,
                dataclasses.replace(stats, site=site, outputs=curvature.pop(site.name, None)),
            )
