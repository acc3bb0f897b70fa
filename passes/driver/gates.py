"""The last stage of a run: what was written is run, measured and judged."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.latency.measure import Slowdown, measure_slowdown
from onnxcomp.passes.latency.model import is_here
from onnxcomp.passes.verification.user_metric import Evaluation

if TYPE_CHECKING:
    from onnxcomp.passes.verification.fidelity import Verification

__all__ = ["Verdict", "accepted_error", "ask_gates", "error_to_reach", "largest_error"]


log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the gates say; None stands for a gate that did not run.

    Attributes:
        verification: The fidelity gate, with the limit of the error.
        evaluation: The user's own measure.
        slowdown: Times of both models.
    """

    verification: Verification | None = None
    evaluation: Evaluation | None = None
    slowdown: Slowdown | None = None

    @property
    def passed(self) -> bool:
        """Whether all gates passed."""
        faithful = self.verification is None or self.verification.passed
        others = (self.evaluation, self.slowdown)
        return faithful and all(gate is None or gate.passed for gate in others)

    @property
    def failure(self) -> str:
        """The first failure, on one line."""
        if self.verification is not None and not self.verification.passed:
            return " ".join(self.verification.failures[0].split())
        if self.slowdown is not None and not self.slowdown.passed:
            return self.slowdown.failure
        if self.evaluation is None or self.evaluation.passed:
            return ""
        scores = self.evaluation
        return f"its score is {scores.compressed:.5g}, the dense model's {scores.dense:.5g}"


def accepted_error(settings: Settings, run: Run) -> float | None:
    """Largest accepted error of an output; None where there is none."""
    limits = [limit for limit in (run.tolerance, settings.max_error) if limit is not None]
    return min(limits, default=None)


def largest_error(verdict: Verdict) -> float | None:
    """The largest error of an output or a slice in either form; None where none was measured."""
    found = verdict.verification
    return found.error if found is not None and found.outputs else None


def error_to_reach(verdict: Verdict, limit: float | None) -> tuple[float, float] | None:
    """The measured error and the one to reach; None where it is not errors that are wrong."""
    found = verdict.verification
    if (
        found is None
        or not found.agreement.passed
        or any(o.problem for o in found.outputs.values())
    ):
        return None
    error = largest_error(verdict) or 0.0
    if limit is not None and error > limit:
        return error, limit
    # How a score follows from errors is not known: half the error is a step.
    return (error, error / 2) if error > 0.0 and verdict.evaluation is not None else None


def ask_gates(reference: Path, small: Path, data: Any, settings: Settings, run: Run) -> Verdict:
    """Run a result against the input; then the user's measure and the clock, where it passes.

    Args:
        reference: The model to compare with.
        small: The result.
        data: Inputs of both; None to make some up.
        settings: Limits that are part of what was asked for.
        run: The circumstances, with the other limits.
    """
    verdict = Verdict(_fidelity(reference, small, data, settings, run) if run.verify else None)
    if not verdict.passed:
        return verdict
    if run.evaluation is not None:
        with run.stage("evaluate"):
            run.evaluation.run(reference, small)
        # A copy: the next attempt measures with the same object.
        verdict = dataclasses.replace(verdict, evaluation=dataclasses.replace(run.evaluation))
    if settings.max_slowdown is None or not verdict.passed:
        return verdict
    if not is_here(settings.target):
        log.warning("time is not measured: this machine is none of the class %s", settings.target)
        return verdict
    with run.stage("time"):
        slowdown = measure_slowdown(
            reference, small, settings.max_slowdown, data, run.shapes, settings.seed
        )
    return dataclasses.replace(verdict, slowdown=slowdown)


def _fidelity(
    reference: Path, small: Path, data: Any, settings: Settings, run: Run
) -> Verification:
    """Compare the result, with and without the operator library, with the input."""
    from onnxcomp.passes.verification.fidelity import verify

    with run.stage("verify"):
        return verify(
            reference,
            small,
            data=data,
            shapes=dict(run.shapes or {}),
            seed=settings.seed,
            tolerance=accepted_error(settings, run),
        )
