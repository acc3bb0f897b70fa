"""What a run returns, and the errors that carry it where a run ended badly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.errors import BudgetError, VerifyError
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.report.report import Report

if TYPE_CHECKING:
    from onnxcomp.passes.verification.fidelity import Verification

__all__ = ["RejectedError", "Result", "TargetMissedError"]


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What `optimize` returns.

    Attributes:
        path: The model that was written; None for a dry run.
        plan: What was decided.
        report: What was done, with numbers.
        verify: Result of the fidelity gate; None when it did not run.
    """

    path: Path | None
    plan: Plan
    report: Report
    verify: Verification | None


class TargetMissedError(BudgetError):
    """The output was written, and is larger than asked for.

    Attributes:
        result: The run, with the path of the output.
    """

    def __init__(self, message: str, result: Result, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.result = result


class RejectedError(VerifyError):
    """The output failed the fidelity gate and lies beside its place as ``*.rejected.onnx``.

    Attributes:
        result: The run, with the path of the rejected model.
    """

    def __init__(self, message: str, result: Result, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.result = result
