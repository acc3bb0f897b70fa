"""How one run goes about its work. None of it decides which bytes a given plan writes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.options import Progress
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.config.values import CalibrationMode
from onnxcomp.passes.encoding.encoder import Workers
from onnxcomp.passes.verification.user_metric import Evaluation
from onnxcomp.runtime.activity import activity

__all__ = ["Run", "worker_count"]


def _cores() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(jobs: int | None) -> int:
    """Threads to use; None stands for all processors.

    Raises:
        UsageError: There would be none.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}", hint="it must be at least 1")
    return _cores() if jobs is None else jobs


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The circumstances of one run.

    Attributes:
        jobs: Threads of the encoders.
        cache: Folder of payloads of earlier runs.
        verify: Whether the fidelity gate runs.
        data: Inputs for calibration and for the gate; None for made-up ones in the gate.
        calibration: How `data` decides about codes: "sequential", "parallel" or "off".
        tune: Passes over the data that tune scales for the outputs.
        shapes: Sizes of inputs with free dimensions, for made-up inputs.
        tolerance: Largest accepted difference to the dense model; None to report it only.
        force: Whether a model that fails the gate is published.
        progress: Called before each weight and after the last one.
        evaluation: The user's own measure of a model, and how far it may drop.
        scheduler: Where weights are encoded on many machines; None for here.
        workers: The workers that `scheduler` stands for, while there is a connection.
        seconds: Wall-clock seconds by stage, filled in as they end.
    """

    jobs: int
    cache: str | os.PathLike[str] | None = None
    verify: bool = True
    data: Any = None
    shapes: Mapping[str, Sequence[int]] | None = None
    tolerance: float | None = None
    force: bool = False
    progress: Progress | None = None
    calibration: CalibrationMode = "sequential"
    tune: int = 0
    evaluation: Evaluation | None = None
    scheduler: str | None = None
    workers: Workers | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def calibrates(self) -> bool:
        """Whether weights are encoded for the inputs that are given."""
        return self.data is not None and self.calibration != "off"

    @contextlib.contextmanager
    def with_workers(self, folder: Path) -> Iterator[Run]:
        """The same run with the workers of its cluster, if it has one, until the block is left.

        Args:
            folder: Of this run; gone after it.
        """
        if self.scheduler is None:
            yield self
            return
        # Clusters take long to import, and few runs have one.
        from onnxcomp.passes.encoding.cluster_connection import connected

        with connected(self.scheduler, folder) as cluster:
            yield dataclasses.replace(self, workers=cluster)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        activity(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.seconds[name] = round(spent, 4)

    def config(self, settings: Settings) -> dict[str, Any]:
        """Settings in effect, for the report."""
        return {
            **settings.to_json(),
            "jobs": self.jobs,
            "cache": None if self.cache is None else str(self.cache),
            "scheduler": self.scheduler,
            "verify": self.verify,
            "data": None if self.data is None else str(self.data),
            "calibration": "off" if self.data is None else self.calibration,
            "tune": self.tune if self.calibrates else 0,
            "shapes": {name: list(dims) for name, dims in (self.shapes or {}).items()},
            "tolerance": self.tolerance,
            "max_drop": None if self.evaluation is None else self.evaluation.max_drop,
            "force": self.force,
        }
