"""What the stages of a run hand to one another.

A run goes one way: a subject is prepared and planned, the plan is emitted, gates judge what was
written. Each stage takes the record of the one before and returns its own; none is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.dataset import SampleSource
from onnxcomp.passes.ir.files import Loaded
from onnxcomp.passes.ir.model import copy_model, load, save
from onnxcomp.passes.latency.model import Timing
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.planning.search_space import CandidateSet

__all__ = ["PlannedModel", "Subject"]


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """The model that a run is about.

    Attributes:
        loaded: The model as it was read; preparing changes it in place.
        reference: Gives the path of the model that results are compared with.
        samples: Gives its inputs.
        name: File name of the output.
    """

    loaded: Loaded
    reference: Callable[[], Path]
    samples: SampleSource
    name: str

    @classmethod
    def of(cls, model: Any, loaded: Loaded, data: Any, name: str, folder: Path) -> Subject:
        """The subject of a run.

        Args:
            model: What the user gave, as `onnxcomp.optimize` accepts it.
            loaded: The same as it was read.
            data: Inputs that the user gave; None where there are none.
            name: File name of the output.
            folder: Takes a file of a model that was given in memory.
        """
        path = folder / f"reference.{name}"

        def reference() -> Path:
            if loaded.path is not None:
                return loaded.path
            return path if path.exists() else save(load(model), path).files[0]

        return cls(loaded, reference, SampleSource(data, reference), name)

    def copy(self) -> Subject:
        """The same subject with a copy of the model, which shares its tensors."""
        loaded = dataclasses.replace(self.loaded, model=copy_model(self.loaded.model))
        return dataclasses.replace(self, loaded=loaded)

    def without_inputs(self, reference: Callable[[], Path]) -> Subject:
        """The same subject compared with another model, which the given inputs do not fit."""
        return dataclasses.replace(self, reference=reference, samples=SampleSource(None, reference))


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model that is ready to be emitted.

    Attributes:
        subject: What the run is about.
        prepared: The canonical model and its weights.
        plan: What was decided.
        candidates: What there was to choose from; None where the plan was given.
        timing: What settings cost in time; None where that does not matter.
    """

    subject: Subject
    prepared: Prepared
    plan: Plan
    candidates: list[CandidateSet] | None
    timing: Timing | None = None
