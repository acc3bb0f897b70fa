"""What pruning did, for people and for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from onnxcomp.passes.transforms.prune.cost import Cost

__all__ = ["FitReport", "GroupReport", "PruneReport"]


@dataclasses.dataclass(frozen=True, slots=True)
class GroupReport:
    """One group of channels.

    Attributes:
        name: The weight that makes them.
        kind: "channels", "heads" or "inner".
        before: Channels, heads, or positions inside each head.
        after: How many are left.
        weights: Initializers that shrank.
    """

    name: str
    kind: str
    before: int
    after: int
    weights: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class FitReport:
    """One product that was fitted again, or one normalisation whose statistics followed.

    Attributes:
        name: Its weight, with the number of the group of a convolution; or its means.
        before: Relative squared error of its output on held-out data, left as it was.
        after: The same with what it has become.
        used: "fit", "anchored", "bias" or "mask" (left as it is) for products; "statistics",
            "means" or "stored" (left as they are) for normalisations.
    """

    name: str
    before: float
    after: float
    used: str


@dataclasses.dataclass(frozen=True, slots=True)
class PruneReport:
    """What pruning did.

    Attributes:
        asked: Share of parameters or FLOPs that was to go.
        reached: Share that went.
        unit: "parameters" of the layers that can shrink, or "flops" of the model.
        score: The score that was used.
        calibrated: Whether there was calibration data.
        before: Cost of the model.
        after: Cost of what is left.
        groups: Groups that lost something.
        fits: Products that were fitted again.
        norms: Normalisations behind them, whose statistics were estimated anew.
        inputs: Inputs and outputs whose shape changed: name, shape before, shape after.
        kept: Weights that keep their channels, with the first reason.
    """

    asked: float
    reached: float
    unit: str
    score: str
    calibrated: bool
    before: Cost
    after: Cost
    groups: tuple[GroupReport, ...]
    fits: tuple[FitReport, ...]
    norms: tuple[FitReport, ...]
    inputs: tuple[tuple[str, str, str], ...]
    kept: tuple[tuple[str, str], ...]

    @property
    def met(self) -> bool:
        """Whether as much went as was asked for."""
        return self.reached >= self.asked - 1e-9

    def to_json(self) -> dict[str, Any]:
        """Everything, in declaration order."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["before"], found["after"] = self.before.to_json(), self.after.to_json()
        found["groups"] = [
            {**dataclasses.asdict(group), "weights": list(group.weights)} for group in self.groups
        ]
        for name in ("fits", "norms"):
            found[name] = [dataclasses.asdict(fit) for fit in getattr(self, name)]
        found["inputs"] = [
            {"name": name, "before": old, "after": new} for name, old, new in self.inputs
        ]
        found["kept"] = [{"name": name, "reason": reason} for name, reason in self.kept]
        found["met"] = self.met
        return found
