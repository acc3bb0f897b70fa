"""onnxcomp: a compiler that makes trained ONNX models small and keeps them runnable everywhere.

    import onnxcomp as oc

    result = oc.optimize("model.onnx", "small.onnx", ratio=8)
    session = oc.InferenceSession("small.onnx")

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onnxcomp import errors

if TYPE_CHECKING:
    from onnxcomp.ops import library_path as get_library_path
    from onnxcomp.ops import register
    from onnxcomp.passes.diagnose import doctor
    from onnxcomp.passes.graph import load, save
    from onnxcomp.passes.graphsurgeon import from_gs, to_gs
    from onnxcomp.passes.pipeline import (
        RejectedError,
        Result,
        TargetMissedError,
        apply,
        expand,
        frontier,
        inspect,
        mend,
        optimize,
        plan,
        verify,
    )
    from onnxcomp.passes.plan import Plan
    from onnxcomp.passes.report import Report
    from onnxcomp.runtime.clients.dropin import InferenceSession, patch_onnxruntime
    from onnxcomp.runtime.package import Package, package

__all__ = [
    "InferenceSession",
    "Package",
    "Plan",
    "RejectedError",
    "Report",
    "Result",
    "TargetMissedError",
    "__version__",
    "apply",
    "doctor",
    "errors",
    "expand",
    "from_gs",
    "frontier",
    "get_library_path",
    "inspect",
    "load",
    "mend",
    "optimize",
    "package",
    "patch_onnxruntime",
    "plan",
    "register",
    "save",
    "to_gs",
    "verify",
]

__version__ = "0.1.0"

# Public name -> module and name there.
_HOMES = {
    "InferenceSession": ("runtime.clients.dropin", "InferenceSession"),
    "Package": ("runtime.package", "Package"),
    "Plan": ("passes.plan", "Plan"),
    "RejectedError": ("passes.pipeline", "RejectedError"),
    "Report": ("passes.report", "Report"),
    "Result": ("passes.pipeline", "Result"),
    "TargetMissedError": ("passes.pipeline", "TargetMissedError"),
    "apply": ("passes.pipeline", "apply"),
    "doctor": ("passes.diagnose", "doctor"),
    "expand": ("passes.pipeline", "expand"),
    "from_gs": ("passes.graphsurgeon", "from_gs"),
    "frontier": ("passes.pipeline", "frontier"),
    "get_library_path": ("ops", "library_path"),
    "inspect": ("passes.pipeline", "inspect"),
    "load": ("passes.graph", "load"),
    "mend": ("passes.pipeline", "mend"),
    "optimize": ("passes.pipeline", "optimize"),
    "package": ("runtime.package", "package"),
    "patch_onnxruntime": ("runtime.clients.dropin", "patch_onnxruntime"),
    "plan": ("passes.pipeline", "plan"),
    "register": ("ops", "register"),
    "save": ("passes.graph", "save"),
    "to_gs": ("passes.graphsurgeon", "to_gs"),
    "verify": ("passes.pipeline", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
