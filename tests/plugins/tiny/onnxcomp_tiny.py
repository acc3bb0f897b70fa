"""A package of somebody else: one codec, one graph pass."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec, Payload, TensorLayout
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.transforms.pass_manager import GraphPass


@dataclasses.dataclass(frozen=True, slots=True)
class TinyParams(Params):
    """No settings."""


class TinyCodec(Codec):
    """8 bits for each weight and one scale for each row: ``W = codes * scale``."""

    name = "tinycodec"
    summary = "one byte for each weight"
    params_type = TinyParams

    def refuse(self, site):
        """Only float32 weights."""
        if site.dtype != "float32":
            return f"tinycodec stores float32, not {site.dtype}"
        return super().refuse(site)

    def layout(self, site, params):
        return {
            "codes": TensorLayout((site.rows, site.length), np.dtype(np.int8)),
            "scale": TensorLayout((site.rows, 1), np.dtype(np.float32)),
        }

    def predict(self, site, params):
        """Uniform steps of a 127th of the largest of `length` normal numbers."""
        return np.sqrt(2 * np.log(max(site.length, 2))) / 127 / np.sqrt(12)

    def encode(self, site, weight, params, *, threads=1):
        scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
        scale[scale == 0] = 1
        return Payload({"codes": np.rint(weight / scale).astype(np.int8), "scale": scale})

    def decode(self, site, payload):
        return payload.tensors["codes"].astype(np.float32) * payload.tensors["scale"]

    def emit(self, builder, site, payload, kind, x):
        floats = builder.node("Cast", [builder.tensor("codes")], {"to": onnx.TensorProto.FLOAT})
        return builder.node("Mul", [floats, builder.tensor("scale")])


class TinyPass(GraphPass):
    """Leaves word in the model."""

    name = "tinypass"
    requires = ("canonicalize",)

    def wanted(self, settings):
        return "tinycodec" in settings.method

    def run(self, model: ir.Model, context) -> Change:
        model.metadata_props["tinypass"] = "was here"
        return Change(1, ("left word in the model",))
