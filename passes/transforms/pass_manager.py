"""What happens to a graph before its weights are looked for: an ordered list of passes."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import onnx_ir as ir

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.dedup_index_tables import IndexedWeights
from onnxcomp.passes.transforms.dedup_values import RepeatedValues
from onnxcomp.passes.transforms.fold_linear_chains import fold_linear_chains
from onnxcomp.passes.transforms.lower_shared_weights import SharedWeights
from onnxcomp.passes.transforms.prune.graph_pass import Prune
from onnxcomp.passes.weight import Feed, Use, WeightSite

__all__ = [
    "GRAPH_PASSES",
    "Canonicalize",
    "Context",
    "GraphPass",
    "LinearChains",
    "no_feeds",
    "run_passes",
]

log = logging.getLogger(__name__)

# Methods that leave values as they are, or nearly so: the graph stays, too.
_EXACT_METHODS = frozenset({"dense", "fp16"})


def no_feeds() -> None:
    """Where no calibration inputs are given."""


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What a graph pass may look at, and where it reports.

    Attributes:
        settings: What is asked for.
        feeds: Gives the calibration inputs, read on the first call; None where there are none.
        facts: Plain values that a pass wants in the report, under its name.
    """

    settings: Settings
    feeds: Callable[[], Sequence[Feed] | None] = no_feeds
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class GraphPass(Protocol):
    """A change of the graph that knows no codec.

    Attributes:
        name: What it is called in logs and reports.
        requires: Names of passes that must have run before it.
        subgraphs: Whether it visits the bodies of If, Loop and Scan.
        functions: Whether it visits model-local functions.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    subgraphs: ClassVar[bool]
    functions: ClassVar[bool]

    def wanted(self, settings: Settings) -> bool:
        """Whether the settings ask for it."""
        ...

    def run(self, model: ir.Model, context: Context) -> Change:
        """Change the model in place."""
        ...


class Canonicalize:
    """Bring the graph into the one form that other passes expect."""

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[tuple[str, ...]] = ()
    subgraphs: ClassVar[bool] = True
    functions: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Always."""
        del settings
        return True

    def run(self, model: ir.Model, context: Context) -> Change:
        """``Constant() -> W`` becomes an initializer ``W``, and so on: see `canonicalize`."""
        del context
        return canonicalize(model)


class LinearChains:
    """Fold linear maps that follow one another, before their weights are looked for."""

    name: ClassVar[str] = "linear_chains"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    subgraphs: ClassVar[bool] = True
    functions: ClassVar[bool] = False

    def wanted(self, settings: Settings) -> bool:
        """Wherever values may change by a rounding."""
        return not set(settings.method) <= _EXACT_METHODS

    def run(self, model: ir.Model, context: Context) -> Change:
        """``MatMul(MatMul(x, A), B) -> MatMul(x, AB)``, and so on: see `fold_linear_chains`."""
        settings = context.settings
        change = fold_linear_chains(
            model,
            min_size=settings.min_size,
            include=settings.include,
            exclude=settings.exclude,
            freeze_inputs=settings.freeze_inputs,
            truncated=functools.partial(_truncated, settings),
        )
        if change.count:
            context.facts[self.name] = {"folded": change.count}
        return change


def _truncated(
    settings: Settings, names: Sequence[str], operator: str, shape: tuple[int, int]
) -> bool:
    """Whether a weight gets two factors and nothing else is asked for."""
    policy = Policy.of(dataclasses.replace(settings, rest="keep"), names, [operator])
    codecs = [CODECS[name] for name in policy.methods]
    rows, length = shape
    use = Use("", operator, 1, "dense" if operator == "Conv" else "matmul")
    site = WeightSite("", shape, "float32", (use,), "", rows, length, False)
    return all(c.spectrum is not None and c.refuse(site) is None for c in codecs)


# In the order in which they run.
GRAPH_PASSES: tuple[GraphPass, ...] = (
    IndexedWeights(),
    Canonicalize(),
    SharedWeights(),
    RepeatedValues(),
    LinearChains(),
    Prune(),
)


def run_passes(
    model: ir.Model, context: Context, passes: Sequence[GraphPass] = GRAPH_PASSES
) -> Mapping[str, Change]:
    """Run the passes that the settings ask for, in order; what each changed, by name.

    Raises:
        ValueError: A pass comes before one that it requires.
    """
    done: dict[str, Change] = {}
    for graph_pass in passes:
        if not graph_pass.wanted(context.settings):
            continue
        missing = [name for name in graph_pass.requires if name not in done]
        if missing:
            raise ValueError(f"pass {graph_pass.name!r} must come after {missing[0]!r}")
        done[graph_pass.name] = graph_pass.run(model, context)
        log.info("%s: %d changes", graph_pass.name, done[graph_pass.name].count)
    return done
