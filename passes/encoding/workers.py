"""Who encodes weights in the place of this process: what callers of a cluster know of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Protocol

import onnx_ir as ir

from onnxcomp.passes.analysis.offsets import Offset
from onnxcomp.passes.calibration.elsewhere import Elsewhere
from onnxcomp.passes.config.options import Progress
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Stats, WeightSite

__all__ = ["Calibrating", "Fit", "Plain", "Workers"]

# Encodes a weight without calibration.
Plain = Callable[[WeightSite], EncodedWeight]

# Encodes weights for the inputs that all of them read, and gives them in their order.
Fit = Callable[[Sequence[WeightSite], Stats], Generator[EncodedWeight, None, None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Calibrating:
    """Calibration by workers.

    Attributes:
        fit: Encodes weights, all at the same time.
        elsewhere: Runs the model and sums up what weights read.
    """

    fit: Fit
    elsewhere: Elsewhere


class Workers(Protocol):
    """The workers of a cluster."""

    def encoding(
        self,
        model: ir.Model,
        work: Sequence[WeightSite],
        plan: Plan,
        *,
        cache: PayloadCache | None = None,
        compare: bool = True,
        progress: Progress | None = None,
    ) -> contextlib.AbstractContextManager[Plain]:
        """Encode weights by their values while the block runs; what is not done then is cancelled.

        Args:
            model: The canonical model; only read.
            work: Weights to encode, in the order in which to begin.
            plan: Decisions for them.
            cache: Payloads of earlier runs.
            compare: Whether codecs are compared with their baselines.
            progress: Told of what is done.

        Yields:
            Gives each of the weights once, when it is done.
        """
        ...

    def calibrating(
        self,
        model: ir.Model,
        plan: Plan,
        offsets: Mapping[str, Offset | None],
        *,
        cache: PayloadCache | None = None,
        progress: Callable[[int, str], None] | None = None,
    ) -> contextlib.AbstractContextManager[Calibrating | None]:
        """Encode weights for their inputs while the block runs.

        Args:
            model: The canonical model; only read.
            plan: Decisions for its weights.
            offsets: For each weight the constant that is added to its products, if there is one.
            cache: Payloads of earlier runs.
            progress: Told how many bytes of weights are done and not asked for yet.

        Yields:
            How to go about it; None where workers do not see a folder of this process, through
            which inputs go.
        """
        ...
