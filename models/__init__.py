"""The torch side of onnxcomp, and the small trained model that `onnxcomp demo` uses.

    from onnxcomp.models import export

    export(module, (x,), "model.onnx", ratio=8)

    from onnxcomp.models import collapse, lorita, parameter_groups

    lorita(module, factors=2)      # train with weight decay on the factors, then collapse

    from onnxcomp.models import share

    share(module, 16)              # train with 16 weights for each parameter

Importing this package imports neither torch nor ONNX; names are imported when they are first used,
and say what is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcomp.models.composed import (
        ComposedConv2d,
        ComposedLinear,
        collapse,
        lorita,
        parameter_groups,
        truncate,
    )
    from onnxcomp.models.decoder_example import decoder_example
    from onnxcomp.models.exporting import ExportResult, TorchCheck, export
    from onnxcomp.models.shared_layers import (
        SharedConv2d,
        SharedEmbedding,
        SharedLinear,
        SharedMemory,
    )
    from onnxcomp.models.sharing import share
    from onnxcomp.models.truncation import choose_ranks

__all__ = [
    "ComposedConv2d",
    "ComposedLinear",
    "ExportResult",
    "SharedConv2d",
    "SharedEmbedding",
    "SharedLinear",
    "SharedMemory",
    "TorchCheck",
    "choose_ranks",
    "collapse",
    "decoder_example",
    "export",
    "lorita",
    "parameter_groups",
    "share",
    "truncate",
]

# Public name -> module it lives in.
_HOMES = {
    "ComposedConv2d": "composed",
    "ComposedLinear": "composed",
    "ExportResult": "exporting",
    "TorchCheck": "exporting",
    "choose_ranks": "truncation",
    "collapse": "composed",
    "decoder_example": "decoder_example",
    "export": "exporting",
    "lorita": "composed",
    "parameter_groups": "composed",
    "truncate": "composed",
    "SharedConv2d": "shared_layers",
    "SharedEmbedding": "shared_layers",
    "SharedLinear": "shared_layers",
    "SharedMemory": "shared_layers",
    "share": "sharing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
