"""Codes of single weights for another class of machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.encoding.encoded import weight_error
from onnxcomp.passes.ir.manifest import ManifestEntry
from onnxcomp.passes.ir.traversal import initializers
from onnxcomp.passes.lowering.restore import stored_placement
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.lowering.targets import better_params
from onnxcomp.passes.weight import WeightSite

__all__ = ["Recoded", "Recoding"]


@dataclasses.dataclass(frozen=True, slots=True)
class Recoded:
    """One weight that got other codes.

    Attributes:
        name: The weight.
        before: Its settings before.
        after: Its settings now.
        error_before: Relative Frobenius error of the old codes; None where the original is not
            known.
        error: Of the new ones, from the original; from the old ones where it is not known.
    """

    name: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    error_before: float | None
    error: float


@dataclasses.dataclass(frozen=True, slots=True)
class Recoding:
    """Weights on their way to the codes of another class of machines.

    Attributes:
        dense: The model with the weights to encode, in canonical form.
        compressed: The model that stores them.
        target: The class of machines.
        known: Whether the dense weights are the original ones.
        jobs: Threads of the encoders.
    """

    dense: ir.Model
    compressed: ir.Model
    target: str
    known: bool
    jobs: int

    def run(self, site: WeightSite, record: ManifestEntry) -> tuple[Placement, Recoded | None]:
        """What to place, and what has changed; None where the weight stays as it is stored."""
        values = initializers(self.compressed)
        params = better_params(record, values, self.target)
        kept = stored_placement(self.dense, site, record, values)
        if params is None:
            return kept, None
        codec = CODECS[record.recipe.codec]
        weight = read_weight(self.dense, site)
        payload = codec.encode(site, weight, params, threads=self.jobs)
        # What a run adds to the attributes of all payloads, such as the precision, stays.
        before = record.recipe.attributes
        extra = {key: value for key, value in before.items() if key not in payload.attributes}
        payload = dataclasses.replace(payload, attributes={**payload.attributes, **extra})
        facts = Recoded(
            site.name,
            record.recipe.params,
            params.to_json(),
            weight_error(weight, codec.decode(site, kept.payload)) if self.known else None,
            weight_error(weight, codec.decode(site, payload)),
        )
        return dataclasses.replace(kept, payload=payload, params=params), facts
