"""Train shared values, after encoding and before the graph is rewritten, where that is asked for.

The training itself needs a framework and is given from outside; see `trainer`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.offsets import shifted
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.perturbation import stored_form
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Payload, SharedValues, ValueSharing
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.encoding.samples import Samples
from onnxcomp.passes.encoding.trainer import trainer
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array

__all__ = ["distilled"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Trained:
    """A weight whose values are trained."""

    item: EncodedWeight
    sharing: ValueSharing
    placement: Placement
    params: Params
    shared: SharedValues

    def stored(self, values: Array) -> tuple[Payload, Array]:
        """The payload with these values, and what they are in it."""
        site, payload = self.placement.site, self.placement.payload
        made = self.sharing.write(site, self.params, payload, values)
        return made, self.sharing.read(site, made).values

    def result(self, model: ir.Model, payload: Payload, note: str) -> EncodedWeight:
        """The weight with its trained values."""
        payload = dataclasses.replace(payload, attributes=self.placement.payload.attributes)
        decoded = self.placement.codec.decode(self.placement.site, payload)
        note = "; ".join(part for part in (self.item.note, note) if part)
        return dataclasses.replace(
            self.item,
            payload=payload,
            error=weight_error(read_weight(model, self.placement.site), decoded),
            output_error=None,
            note=note,
        )


def _trainable(item: EncodedWeight) -> _Trained | None:
    """A weight that can be trained; None for others."""
    placement = item.placement
    if placement is None or placement.params is None:
        return None
    sharing = placement.codec.sharing
    if sharing is None:
        return None
    shared = sharing.read(placement.site, placement.payload)
    return _Trained(item, sharing, placement, placement.params, shared)


def distilled(
    model: ir.Model,
    encoded: Sequence[EncodedWeight],
    plan: Plan,
    samples: Samples | None,
    folder: Path | None = None,
) -> list[EncodedWeight]:
    """Weights with trained values, where those are better on inputs that were set aside.

    Args:
        model: The canonical dense model; only read.
        encoded: Its weights.
        plan: Says how many steps.
        samples: Calibration inputs.
        folder: Where temporary files lie.

    Raises:
        UsageError: There are no calibration inputs.
        RuntimeMissingError: torch is not installed.
    """
    found = [made for item in encoded if (made := _trainable(item))]
    if samples is None:
        raise UsageError("distillation needs inputs", hint="give inputs with --data")
    if not found:
        log.warning("nothing to distill: no weight shares values (--method hash makes them share)")
        return list(encoded)
    train = trainer()
    try:
        values, before, after = train(
            model,
            [one.shared for one in found],
            samples.feeds,
            plan.settings.distill,
            lambda number, array: found[number].stored(array)[1],
            fixed=_decoded(model, encoded, {one.shared.name for one in found}),
            seed=plan.settings.seed,
            folder=folder,
        )
    except ModelError as error:
        log.warning("not distilled: %s", error.message)
        return list(encoded)
    said = f"outputs have error {before:.3g} on inputs kept aside, distilled {after:.3g}"
    log.info("%s", said)
    if not after < before:
        log.warning("not distilled: %s", said)
        return list(encoded)
    changed = {
        one.shared.name: one.result(model, one.stored(array)[0], said)
        for one, array in zip(found, values, strict=True)
    }
    return [changed.get(item.site.name, item) for item in encoded]


def _decoded(
    model: ir.Model, encoded: Sequence[EncodedWeight], trained: set[str]
) -> dict[str, Array]:
    """Stored tensors of the compressed weights that are not trained, and moved offsets."""
    placements = [item.placement for item in encoded if item.site.name not in trained]
    weights = {
        p.site.name: stored_form(p.site, p.codec.decode(p.site, p.payload))
        for p in placements
        if p is not None
    }
    shifts = (item.shift for item in encoded if item.shift is not None)
    return weights | {shift.name: shifted(model, shift).numpy() for shift in shifts}
