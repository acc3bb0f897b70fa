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

__all__ = ["RejectedError", "Result", "TargetMissedError", "judged"]


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


def judged(result: Result, failure: str) -> Result:
    """The result; raises the error that belongs to its verdict.

    Args:
        result: The run.
        failure: Why the output is rejected; empty where it is not.

    Raises:
        RejectedError: It is.
        TargetMissedError: The output is larger, or less is pruned, than asked for.
    """
    if failure:
        raise RejectedError(
            f"the compressed model failed verification: {failure}; it was kept as {result.path}",
            result,
            hint="compare it with onnxcomp verify; --force writes it anyway",
        )
    pruned = result.plan.pruned
    if pruned is not None and not pruned.met:
        what = "of the parameters that can go" if pruned.unit == "parameters" else "of the FLOPs"
        raise TargetMissedError(
            f"{result.path}: pruning took {100 * pruned.reached:.1f} % {what}, "
            f"{100 * pruned.asked:.1f} % were asked for",
            result,
            hint="onnxcomp inspect --groups shows what can be pruned, and why the rest cannot",
        )
    wanted = result.plan.budget.bytes
    if wanted is not None and result.report.output.bytes > wanted:
        raise TargetMissedError(
            f"{result.path} has {result.report.output.bytes} bytes, {wanted} were asked for: "
            "no plan is smaller",
            result,
            hint="allow a larger target, a smaller --min-size or more methods",
        )
    return result
