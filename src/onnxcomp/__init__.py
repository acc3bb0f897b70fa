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
from onnxcomp.passes.encoding import trainer as _trainer
from onnxcomp.version import __version__

if TYPE_CHECKING:
    from onnxcomp.ops import library_path as get_library_path
    from onnxcomp.ops import register
    from onnxcomp.passes.driver.api import (
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
        retarget,
        verify,
    )
    from onnxcomp.passes.ir.graphsurgeon import to_gs
    from onnxcomp.passes.ir.loader import from_gs
    from onnxcomp.passes.ir.model import load, save
    from onnxcomp.passes.planning.plan import Plan
    from onnxcomp.passes.report.doctor import doctor
    from onnxcomp.passes.report.report import Report
    from onnxcomp.runtime.clients.dropin import InferenceSession, patch_onnxruntime
    from onnxcomp.runtime.language.evaluation import evaluate_lm
    from onnxcomp.runtime.package import Archive, Package, archive, package, restore
    from onnxcomp.runtime.weight_sharing import share_weights

__all__ = [
    "Archive",
    "InferenceSession",
    "Package",
    "Plan",
    "RejectedError",
    "Report",
    "Result",
    "TargetMissedError",
    "__version__",
    "apply",
    "archive",
    "doctor",
    "errors",
    "evaluate_lm",
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
    "restore",
    "retarget",
    "save",
    "share_weights",
    "to_gs",
    "verify",
]

# Public name -> module and name there.
_HOMES = {
    "Archive": ("runtime.package", "Archive"),
    "InferenceSession": ("runtime.clients.dropin", "InferenceSession"),
    "Package": ("runtime.package", "Package"),
    "Plan": ("passes.planning.plan", "Plan"),
    "RejectedError": ("passes.driver.api", "RejectedError"),
    "Report": ("passes.report.report", "Report"),
    "Result": ("passes.driver.api", "Result"),
    "TargetMissedError": ("passes.driver.api", "TargetMissedError"),
    "apply": ("passes.driver.api", "apply"),
    "archive": ("runtime.package", "archive"),
    "doctor": ("passes.report.doctor", "doctor"),
    "evaluate_lm": ("runtime.language.evaluation", "evaluate_lm"),
    "expand": ("passes.driver.api", "expand"),
    "from_gs": ("passes.ir.loader", "from_gs"),
    "frontier": ("passes.driver.api", "frontier"),
    "get_library_path": ("ops", "library_path"),
    "inspect": ("passes.driver.api", "inspect"),
    "load": ("passes.ir.model", "load"),
    "mend": ("passes.driver.api", "mend"),
    "optimize": ("passes.driver.api", "optimize"),
    "package": ("runtime.package", "package"),
    "patch_onnxruntime": ("runtime.clients.dropin", "patch_onnxruntime"),
    "plan": ("passes.driver.api", "plan"),
    "register": ("ops", "register"),
    "restore": ("runtime.package", "restore"),
    "retarget": ("passes.driver.api", "retarget"),
    "save": ("passes.ir.model", "save"),
    "share_weights": ("runtime.weight_sharing", "share_weights"),
    "to_gs": ("passes.ir.graphsurgeon", "to_gs"),
    "verify": ("passes.driver.api", "verify"),
}


def _distill() -> _trainer.Trainer:
    """The training of shared values, which needs torch."""
    from onnxcomp.models.distilling import distill

    return distill


# Passes train by what the package gives them: the only place that knows both.
_trainer.provide(_distill)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
