"""Size against expected error."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.prepare import prepare
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.state import Subject
from onnxcomp.passes.ir.files import read
from onnxcomp.passes.planning.candidate_sets import candidate_sets
from onnxcomp.passes.planning.measurements import measure
from onnxcomp.passes.planning.pareto import FrontierPoint, pareto_points

__all__ = ["frontier"]


def frontier(model: Any, settings: Settings, run: Run) -> list[FrontierPoint]:
    """Mixed plans from the smallest to the dense model, and plans with equal settings, by size."""
    loaded = read(model)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject.of(model, loaded, run.data, "out.onnx", Path(folder))
        prepared = prepare(loaded, settings, subject.samples)
        samples, calibrated = subject.samples, run.calibrates
        known = measure(prepared, settings, samples, calibrated=calibrated, mixed=True)
        sets = candidate_sets(prepared, known)
    return pareto_points(sets, prepared, settings)
