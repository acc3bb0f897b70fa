"""Load, copy and save models. Everything here works on `onnx_ir.Model`.

The parts: `loader` (from any source, weights left in their files), `external_data` (where files
may lie), `protobuf_wire` (.onnx files without their tensors), `serializer` (back to protobuf),
`writer` (streamed output, exact sizes), `traversal` (walking and editing).
"""

from __future__ import annotations

import dataclasses

from onnxcomp.passes.ir.loader import copy_model, load
from onnxcomp.passes.ir.writer import ExternalData, Saved, output_size, save

__all__ = ["Change", "ExternalData", "Saved", "copy_model", "load", "output_size", "save"]


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What a pass did to a model.

    Attributes:
        count: How many things it changed; 0 means that the model is as it was.
        notes: What it did, one sentence each, for people.
    """

    count: int
    notes: tuple[str, ...] = ()
