"""What pruning did to a model: the record that plans, the driver and the report read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from onnxcomp.errors import UsageError

__all__ = ["Cost", "FitReport", "GroupReport", "PruneReport", "SearchReport", "TuningReport"]


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What a model takes.

    Attributes:
        parameters: Elements of floating-point initializers.
        flops: Floating-point operations of products, two for each multiplication, on the inputs
            the sizes were learnt from.
        cache_bytes: Bytes of cache inputs for each position and sample; 0 without caches.
    """

    parameters: int
    flops: int
    cache_bytes: int

    def to_json(self) -> dict[str, int]:
        """The numbers by name."""
        return dataclasses.asdict(self)


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
        few: Whether a product has seen fewer input vectors than its second moments need: a fit to
            them says little about others.
    """

    name: str
    before: float
    after: float
    used: str
    few: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SearchReport:
    """What other divisions of the budget between layers were worth.

    Attributes:
        before: Loss of the outputs on calibration inputs, by the first division.
        after: The same by the best one; equal where none was better.
        tried: How many others the model was fitted to.
    """

    before: float
    after: float
    tried: int


@dataclasses.dataclass(frozen=True, slots=True)
class TuningReport:
    """What tuning all weights together found.

    Attributes:
        before: Loss on inputs that were set aside, without it.
        after: The least one after a pass over the data; the same where none was better.
        passes: After how many passes that was; 0 where the weights are as fits left them.
    """

    before: float
    after: float
    passes: int


@dataclasses.dataclass(frozen=True, slots=True)
class PruneReport:
    """What pruning did.

    Attributes:
        asked: Share of parameters or FLOPs to remove.
        reached: Share that was removed.
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
        tuned: What tuning found; None where nothing was tuned.
        searched: What the search between layers found; None where there was none.
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
    tuned: TuningReport | None = None
    searched: SearchReport | None = None

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
        found["tuned"] = None if self.tuned is None else dataclasses.asdict(self.tuned)
        found["searched"] = None if self.searched is None else dataclasses.asdict(self.searched)
        found["met"] = self.met
        return found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PruneReport:
        """Inverse of `to_json`.

        Raises:
            UsageError: Something is missing or unknown.
        """
        plain = {name: value for name, value in values.items() if name != "met"}
        try:
            for name in ("before", "after"):
                plain[name] = Cost(**plain[name])
            plain["groups"] = tuple(
                GroupReport(**{**group, "weights": tuple(group["weights"])})
                for group in plain["groups"]
            )
            for name in ("fits", "norms"):
                plain[name] = tuple(FitReport(**fit) for fit in plain[name])
            plain["inputs"] = tuple((x["name"], x["before"], x["after"]) for x in plain["inputs"])
            plain["kept"] = tuple((x["name"], x["reason"]) for x in plain["kept"])
            if plain.get("tuned") is not None:
                plain["tuned"] = TuningReport(**plain["tuned"])
            if plain.get("searched") is not None:
                plain["searched"] = SearchReport(**plain["searched"])
            return cls(**plain)
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"this is not what pruning reports: {error}", hint="make the plan again"
            ) from error
