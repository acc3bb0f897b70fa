"""Plans from the smallest to the dense model: size against expected error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.lagrangian import allocate
from onnxcomp.passes.planning.planner import measured_size
from onnxcomp.passes.planning.search_space import CandidateSet, equal_plans
from onnxcomp.passes.planning.size_fitting import with_dense
from onnxcomp.passes.planning.solver import expected_error

__all__ = ["FrontierPoint", "pareto_points"]

# Mixed plans between the smallest and the dense model.
_POINTS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One plan.

    Attributes:
        setting: What every weight gets; empty for a plan that mixes settings.
        bytes: Bytes of the output, exactly.
        ratio: Bytes of the input over them.
        error: Expected relative error of the outputs; None where it is not known, because there
            are no real inputs.
        weight_error: Expected relative error of the weights: a mean, weighted as the objective
            counts it.
    """

    setting: str
    bytes: int
    ratio: float
    error: float | None
    weight_error: float

    def to_json(self) -> dict[str, Any]:
        """The point as plain values."""
        plain = dataclasses.asdict(self)
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in plain.items()
        }


def pareto_points(
    sets: Sequence[CandidateSet], prepared: Prepared, settings: Settings
) -> list[FrontierPoint]:
    """Mixed plans and plans with equal settings for all weights, by size.

    Args:
        sets: What there is to choose from.
        prepared: The model and its weights.
        settings: What is asked for.
    """
    found: dict[int, FrontierPoint] = {}
    for setting, picks in (*_equal(sets), *_mixed(sets)):
        total = measured_size(prepared, settings, "out.onnx", picks)
        error, weight_error = expected_error(sets, picks), _weight_error(sets, picks)
        ratio = prepared.source.bytes / max(1, total)
        found[total] = FrontierPoint(setting, total, ratio, error, weight_error)
    return [found[total] for total in sorted(found)]


def _mixed(sets: Sequence[CandidateSet]) -> Iterator[tuple[str, list[Candidate]]]:
    sets = [with_dense(candidates) for candidates in sets]
    low = max(1, sum(min(c.bytes for c in candidates.options) for candidates in sets))
    high = max(1, sum(max(c.bytes for c in candidates.options) for candidates in sets))
    for point in range(_POINTS):
        share = point / (_POINTS - 1)
        yield "", allocate(sets, math.ceil(low ** (1 - share) * high**share))


def _equal(sets: Sequence[CandidateSet]) -> Iterator[tuple[str, list[Candidate]]]:
    """Plans with one number of bits per weight for all; the others differ from site to site."""
    for picks in equal_plans(sets):
        first = next((pick for pick in picks if not pick.reason), None)
        width = None if first is None else CODECS[first.codec].width
        if first is not None and width is not None:
            yield f"{first.codec} {width}={getattr(first.params, width)}", picks


def _weight_error(sets: Sequence[CandidateSet], picks: Sequence[Candidate]) -> float:
    counts = [candidates.prior or 0.0 for candidates in sets]
    noise = sum(n * pick.error**2 for n, pick in zip(counts, picks, strict=True))
    return math.sqrt(noise / sum(counts)) if counts else 0.0
