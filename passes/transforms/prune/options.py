"""What can be said about how a model is pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.values import SCORES, PruneScore
from onnxcomp.passes.transforms.prune.choose import Numerical

__all__ = ["PruneOptions"]


@dataclasses.dataclass(frozen=True, slots=True)
class PruneOptions:
    """How a model is pruned.

    Attributes:
        ratio: Share of the parameters of the layers that can shrink that is to go.
        target_flops: Share of the model's FLOPs that is to stay; instead of `ratio`.
        score: What decides which channels go.
        allocation: "knapsack" for one budget over all layers, "uniform" for the same share of
            each; "auto" is what goes with the score.
        compensate: "fit" to fit what stays, "bias" for biases only, "none".
        behind: Whether layers behind pruned ones are fitted, too.
        measure: Whether losses of layers are scaled to those of the outputs, which are measured.
        search: How many other divisions of the budget between layers are tried, at most.
        tune: Whether all that is left is tuned together, where that is within reach.
        numerical: How the score of this name is read.
        least: Share of each group that always stays.
        round_to: Groups of 64 channels or more lose this many at a time.
        caches: Whether inputs and outputs that hold a cache may shrink.
        freeze_inputs: Whether initializers that are also inputs may shrink.
        include: Regular expressions; when given, only groups with a matching weight shrink.
        exclude: Regular expressions of weights that keep their shape.
    """

    ratio: float | None = None
    target_flops: float | None = None
    score: PruneScore = "obs"
    allocation: Literal["auto", "knapsack", "uniform"] = "auto"
    compensate: Literal["fit", "bias", "none"] = "fit"
    behind: bool = True
    measure: bool = True
    search: int = 0
    tune: bool = True
    numerical: Numerical = Numerical()  # noqa: RUF009
    least: float = 0.1
    round_to: int = 8
    caches: bool = True
    freeze_inputs: bool = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def check(self) -> None:
        """Raise `UsageError` for values out of range."""
        if (self.ratio is None) == (self.target_flops is None):
            raise UsageError(
                "pruning needs a ratio or a FLOPs target",
                hint="give --prune-ratio 0.3 or --target-flops 0.7",
            )
        for name in ("ratio", "target_flops"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise UsageError(f"{name} is {value}", hint="it is a share between 0 and 1")
        if self.search and (self.score, self.compensate) != ("obs", "fit"):
            raise UsageError(
                f"other divisions of a budget are tried with the score obs, not {self.score}",
                hint="leave --prune-search or --prune-score out",
            )
        if self.score not in SCORES:
            raise UsageError(f"score {self.score!r} is unknown", hint=f"one of {', '.join(SCORES)}")

    def used_score(self, *, calibrated: bool) -> PruneScore:
        """The score, or its replacement where there is no calibration data."""
        return self.score if calibrated else "magnitude"

    @property
    def tunes(self) -> bool:
        """Whether what is left is tuned together; only the default score's results are."""
        return self.tune and self.score == "obs" and self.compensate == "fit"

    @property
    def share(self) -> float:
        """Share that is to go."""
        return self.ratio if self.ratio is not None else 1.0 - (self.target_flops or 0.0)

    @property
    def unit(self) -> str:
        """What the share is of."""
        return "parameters" if self.ratio is not None else "flops"
