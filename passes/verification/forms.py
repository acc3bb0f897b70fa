"""Compare what two forms of a model give, up to where a decision falls differently."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.taps import Tap, Taps
from onnxcomp.passes.verification.detections import DetectionAgreement, Detections
from onnxcomp.passes.verification.numerics import (
    FEW,
    MINIMUM_AGREEMENT,
    Comparison,
    Metrics,
    Sizes,
    is_float,
)
from onnxcomp.passes.weight import Array

if TYPE_CHECKING:
    import onnxruntime

    from onnxcomp.runtime.evaluate import Feed, Outputs

__all__ = ["NO_TAPS", "Compared", "Signature", "compare", "judge", "worst_error"]

NO_TAPS = Taps((), (), {}, frozenset())

# What a part of an output that is no tensor adds to the name of the output.
_PART = re.compile(r"(\[\d+\]|\..*)$")


@dataclasses.dataclass(frozen=True, slots=True)
class Signature:
    """What a model declares of its outputs.

    Attributes:
        shapes: Sizes and names of axes by output; None where nothing is declared.
        inputs: Names of axes by input.
        lists: Outputs that are no tensors: how many parts they have may depend on values.
        discrete: Outputs that hold no floats.
    """

    shapes: Mapping[str, tuple[int | str | None, ...] | None]
    inputs: Mapping[str, tuple[int | str | None, ...]]
    lists: frozenset[str] = frozenset()
    discrete: frozenset[str] = frozenset()

    @classmethod
    def of(cls, session: onnxruntime.InferenceSession, added: Container[str] = ()) -> Signature:
        """The signature of a session, without outputs that were added to the model."""
        outputs = [value for value in session.get_outputs() if value.name not in added]
        return cls(
            {value.name: _dims(value.shape) for value in outputs},
            {value.name: _dims(value.shape) or () for value in session.get_inputs()},
            frozenset(v.name for v in outputs if not v.type.startswith("tensor(")),
            frozenset(v.name for v in outputs if "float" not in v.type and "double" not in v.type),
        )

    @classmethod
    def of_graph(cls, graph: ir.Graph, added: Container[str] = ()) -> Signature:
        """The signature that a graph declares, without outputs that were added to it."""
        inputs = [value for value in graph.inputs if not value.is_initializer()]
        outputs = {v.name or "": v for v in graph.outputs if v.name not in added}
        return cls(
            {name: _declared(value) for name, value in outputs.items()},
            {value.name or "": _declared(value) or () for value in inputs},
            frozenset(
                name
                for name, value in outputs.items()
                if value.type is not None and not isinstance(value.type, ir.TensorType)
            ),
            frozenset(
                name
                for name, value in outputs.items()
                if value.dtype is not None and not value.dtype.is_floating_point()
            ),
        )

    def sizes(self, name: str, wanted: Array, feed: Feed) -> Sizes:
        """Which sizes of an output are fixed, by the model or by its inputs."""
        dims = self.shapes.get(name)
        if dims is None or len(dims) != wanted.ndim:
            return Sizes(None)
        known = {
            dim: size
            for key, array in feed.items()
            for dim, size in zip(self.inputs.get(key, ()), np.shape(array), strict=False)
        }
        return Sizes(
            tuple(
                size if dim == size or (isinstance(dim, str) and known.get(dim) == size) else None
                for dim, size in zip(dims, wanted.shape, strict=True)
            )
        )

    def axes(self, name: str) -> Sizes:
        """Which sizes of an output the model itself fixes: the axes that may be cut."""
        dims = self.shapes.get(name)
        if dims is None:
            return Sizes(None)
        return Sizes(tuple(dim if isinstance(dim, int) else None for dim in dims))


def _declared(value: ir.Value) -> tuple[int | str | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def _dims(shape: Sequence[int | str | None] | None) -> tuple[int | str | None, ...] | None:
    return None if shape is None else tuple(shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """Differences of two forms.

    Attributes:
        outputs: Of the outputs, over all samples.
        taps: Of the floats in front of decisions, as far as these fell the same before them.
        faithful: Of the outputs, over the samples in which every decision before them fell the
            same.
        detections: How many detections are found again; None where there are none.
    """

    outputs: Mapping[str, Metrics]
    taps: Mapping[str, Metrics]
    faithful: Mapping[str, Metrics]
    detections: Detections | None = None

    @property
    def worst(self) -> float:
        """The largest error that a limit is held against; 0 where nothing is known."""
        return worst_error(self.outputs, self.taps)


def worst_error(outputs: Mapping[str, Metrics], taps: Mapping[str, Metrics]) -> float:
    """The largest error of floats: those of the outputs, and those that are decided on."""
    judged = [found for found in outputs.values() if found.agreement is None or not taps]
    judged = [found for found in (*judged, *taps.values()) if not found.resized]
    return max((found.judged for found in judged), default=0.0)


class _Run:
    """The comparison of two forms, sample by sample."""

    def __init__(self, taps: Taps, signature: Signature) -> None:
        self.taps, self.signature = taps, signature
        self.outputs: dict[str, Comparison] = {}
        self.inner: dict[str, Comparison] = {}
        self.faithful: dict[str, Comparison] = {}
        self.missing: set[str] = set()
        self.detections = DetectionAgreement()
        self._keys = {tap.key for tap in taps.all}
        self._names = set(signature.shapes)

    def add(self, feed: Feed, wanted: Outputs, found: Outputs) -> None:
        """Take in one sample."""
        fallen = self._fallen(wanted, found)
        self.detections.add(
            *({n: run[n] for n in self._names & set(run)} for run in (wanted, found))
        )
        for name, array in wanted.items():
            base = name if name in self._names else _PART.sub("", name)
            if base not in self._names:
                continue
            if name not in found:
                self.missing.add(name)
                self._comparison(self.outputs, name, base)
                continue
            sizes = self.signature.sizes(base, array, feed)
            self._comparison(self.outputs, name, base).add(array, found[name], sizes)
            if not self.taps.behind.get(base, frozenset()) & fallen:
                self._comparison(self.faithful, name, base).add(array, found[name], sizes)
        for tap in self.taps.values:
            self._add_tap(tap, wanted, found, fallen)

    def _comparison(self, where: dict[str, Comparison], name: str, base: str) -> Comparison:
        if name not in where:
            stepped = base in self.taps.stepped
            where[name] = Comparison(name, self.signature.axes(base), stepped=stepped)
        return where[name]

    def _fallen(self, wanted: Outputs, found: Outputs) -> set[str]:
        """Keys of decisions of the main graph that fell differently; of loops that did at all."""
        return {
            tap.key
            for tap in self.taps.decisions
            if tap.key in wanted and tap.key in found and not _same(wanted[tap.key], found[tap.key])
        }

    def _add_tap(self, tap: Tap, wanted: Outputs, found: Outputs, fallen: set[str]) -> None:
        a, b = wanted.get(tap.key), found.get(tap.key)
        if a is None or b is None or not is_float(a) or not is_float(b):
            return
        before = self.taps.behind.get(tap.key, frozenset())
        if tap.loop and not tap.once:
            own = [one for one in self.taps.decisions if one.loop == tap.loop]
            rounds = _common_rounds(own, wanted, found)
            a, b = a[:rounds], b[:rounds]
            before -= {one.key for one in own}
        if before & fallen or a.shape != b.shape:
            return
        self.inner.setdefault(tap.key, Comparison(tap.name, Sizes(None))).add(a, b)

    def result(self) -> Compared:
        """All metrics."""
        outputs = {name: found.result() for name, found in self.outputs.items()}
        for name in self.missing:
            resized = _PART.sub("", name) in self.signature.lists
            text = {"resized" if resized else "problem": "is missing"}
            outputs[name] = dataclasses.replace(outputs[name], rel_l2=math.inf, **text)  # type: ignore[arg-type]
        return Compared(
            outputs,
            {name: found.result() for name, found in self.inner.items()},
            {name: found.result() for name, found in self.faithful.items()},
            self.detections.result(),
        )


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=is_float(a)))


def _common_rounds(decisions: Sequence[Tap], wanted: Outputs, found: Outputs) -> int:
    """Iterations of a loop up to the first decision that fell differently, that one included."""
    rounds: list[int] = []
    for tap in decisions:
        a, b = wanted.get(tap.key), found.get(tap.key)
        if a is None or b is None or not a.ndim or a.shape[1:] != b.shape[1:]:
            continue
        count = min(len(a), len(b))
        same = (a[:count] == b[:count]).reshape(count, -1).all(axis=1)
        rounds.append(count if same.all() else int(np.argmin(same)) + 1)
    return min(rounds, default=1)


def compare(
    reference: Sequence[Outputs],
    values: Sequence[Outputs],
    feeds: Sequence[Feed],
    signature: Signature,
    taps: Taps = NO_TAPS,
) -> Compared:
    """Metrics of every output over all samples; nothing where a form did not run.

    Args:
        reference: What should have come out of each sample, taps by key.
        values: What came out.
        feeds: The inputs.
        signature: Of the reference.
        taps: Inner values that were given out.
    """
    run = _Run(taps, signature)
    for feed, wanted, found in zip(feeds, reference, values, strict=False):
        run.add(feed, wanted, found)
    return run.result()


def judge(
    outputs: Mapping[str, Metrics],
    taps: Mapping[str, Metrics],
    tolerance: float | None,
    where: str,
    *,
    slices: bool = False,
) -> list[str]:
    """What is wrong with the outputs, in words.

    Args:
        outputs: Metrics of outputs.
        taps: Metrics of the floats in front of decisions.
        tolerance: Largest relative difference; None where only problems are wrong.
        where: What comes before the subject of a sentence.
        slices: Whether the worst slice is what is held against the tolerance.
    """
    wrong = []
    named = [(f"output {name!r}", found) for name, found in outputs.items()]
    inner = [(f"value {name!r} before a decision", found) for name, found in taps.items()]
    for subject, found in (*named, *inner):
        if found.problem:
            wrong.append(f"{where}{subject}: {found.problem}")
        elif tolerance is None:
            continue
        elif found.resized:
            if slices and not taps and found.agreement is None:
                wrong.append(f"{where}{subject}: {found.resized}")
        elif found.agreement is not None:
            if not taps and _disagrees(found, tolerance):
                share = f"only {found.agreement:.2%} of its elements agree"
                wrong.append(f"{where}{subject}: {share}")
        elif not (found.judged if slices else found.rel_l2) <= tolerance:
            wrong.append(f"{where}{subject}: {_excess(found, tolerance, slices=slices)}")
    return wrong


def _disagrees(found: Metrics, tolerance: float) -> bool:
    """Where no floats are known that are decided on: whether too many of many elements differ."""
    least = min(MINIMUM_AGREEMENT, 1 - tolerance)
    return found.elements >= FEW and (found.agreement or 0.0) < least


def _excess(found: Metrics, tolerance: float, *, slices: bool) -> str:
    worst = found.worst_slice
    if slices and worst is not None and worst.rel_l2 > found.rel_l2:
        share = f"relative difference {worst.rel_l2:.3g} > {tolerance:.3g}"
        return f"{share} at {worst.text}, of the whole output {found.rel_l2:.3g}"
    return f"relative difference {found.rel_l2:.3g} > {tolerance:.3g}"
