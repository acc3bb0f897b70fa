"""The fidelity gate: run a compressed model in both its forms and against its original.

The *library* form runs the operators of com.onnxcomp by their kernels, the *portable* form by their
definitions inside the file. Both decode the same weights, so with exact arithmetic they may differ
by rounding alone: that is judged. What activations rounded to int8 add is a number of its own.

Where an output holds integers, texts or as many rows as values decide, and where a comparison
fails, copies of the models give out the last floats before each decision, and those are compared.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import ModelError, UsageError, VerifyError
from onnxcomp.passes.analysis.taps import Taps, find_taps
from onnxcomp.passes.verification.clock import Clock
from onnxcomp.passes.verification.copies import INT8, Copy
from onnxcomp.passes.verification.detections import Detections
from onnxcomp.passes.verification.forms import (
    NO_TAPS,
    Compared,
    Signature,
    compare,
    judge,
    worst_error,
)
from onnxcomp.passes.verification.forms_in_memory import Memory
from onnxcomp.passes.verification.numerics import Metrics, fidelity_tolerance, is_float

if TYPE_CHECKING:
    import onnx

    from onnxcomp.runtime.evaluate import Feed, Outputs
    from onnxcomp.runtime.inputs import Data

__all__ = ["Form", "Verification", "verify"]

PathLike = str | os.PathLike[str]

# Attributes of products: TensorProto types.
_TYPE_NAMES = {1: "float32", 10: "float16", 16: "bfloat16"}

# Forms of the compressed model, as subjects of sentences.
_LIBRARY, _PORTABLE, _EXACT = (
    "the compressed model", "without the library it", "in exact arithmetic it",
)  # fmt: skip

# What comes before the subject of a sentence about the two forms.
_BOTH = "with and without the library, "

# The largest tolerance of the two forms, for models that make errors of rounding larger: beyond it
# a kernel that is wrong could not be told from one that rounds.
_MOST_AMPLIFIED = 1e-2

# Bytes of outputs that are kept of one form; up to four forms are compared. A language model's
# logits of one window are 50 MB.
_KEPT = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One comparison of outputs.

    Attributes:
        passed: Whether nothing is wrong with it.
        outputs: Metrics by output name.
        taps: Metrics of the floats in front of decisions, by the names of these values.
    """

    passed: bool
    outputs: Mapping[str, Metrics]
    taps: Mapping[str, Metrics] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        outputs = {name: metrics.to_json() for name, metrics in self.outputs.items()}
        taps = {name: metrics.to_json() for name, metrics in self.taps.items()}
        found: dict[str, Any] = {"passed": self.passed, "outputs": outputs}
        return found | ({"before_decisions": taps} if taps else {})


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        passed: Whether both forms run, agree with each other, and meet the tolerance if there is
            one.
        outputs: Library form against the original, by output name.
        portable: Portable form against the original.
        agreement: Portable form against the library form in exact arithmetic.
        fidelity_tolerance: Largest relative difference of the two forms that passes.
        failures: What is wrong, in words; empty when all passed.
        samples: How many inputs were run.
        taps: Like `outputs`, of the floats in front of decisions.
        int8: Library form as it is against the same in exact arithmetic: what rounding activations
            to int8 adds; None where none are rounded.
        tolerance: Largest accepted difference to the original; None where the loss was not judged.
        detections: How many of the original's detections are found again; None for other models.
        slowdown: How many times as long as the original the library form ran on these inputs, as
            far as such short runs tell: in processor time, without the first run where there are
            several.
        layer_by_layer: Forms that did not fit into memory and ran in pieces, in words.
    """

    passed: bool
    outputs: Mapping[str, Metrics]
    portable: Form
    agreement: Form
    fidelity_tolerance: float
    failures: tuple[str, ...]
    samples: int
    taps: Mapping[str, Metrics] = dataclasses.field(default_factory=dict)
    int8: Form | None = None
    tolerance: float | None = None
    detections: Detections | None = None
    slowdown: float | None = None
    layer_by_layer: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``onnxcomp verify``."""
        found = {
            **Form(self.passed, self.outputs, self.taps).to_json(),
            "portable": self.portable.to_json(),
            "agreement": {**self.agreement.to_json(), "tolerance": self.fidelity_tolerance},
            "failures": list(self.failures),
            "samples": self.samples,
            "tolerance": self.tolerance,
        }
        if self.slowdown is not None:
            found["slowdown"] = round(self.slowdown, 3)
        if self.layer_by_layer:
            found["layer_by_layer"] = list(self.layer_by_layer)
        if self.int8 is not None:
            found["int8"] = self.int8.to_json()
        if self.detections is not None:
            found["detections"] = self.detections.to_json()
        return found

    @property
    def error(self) -> float:
        """The error that limits are held against: of the worst output and slice, of both forms."""
        portable = worst_error(self.portable.outputs, self.portable.taps)
        return max(worst_error(self.outputs, self.taps), portable)

    def raise_if_failed(self) -> None:
        """Raise `VerifyError` unless all passed."""
        if not self.passed:
            raise VerifyError(
                "; ".join(self.failures[:3]),
                hint="onnxcomp verify REFERENCE COMPRESSED --json shows all outputs",
            )


def verify(
    reference: PathLike,
    compressed: PathLike,
    *,
    data: Data | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int = 4,
    seed: int = 0,
    tolerance: float | None = None,
    memory: int | None = None,
) -> Verification:
    """Compare a compressed model with its original, with and without the operator library.

    One session at a time is open; outputs of the samples are kept in memory, of so many samples as
    take 256 MiB. A form that does not fit into memory runs layer by layer, with a notice.

    Args:
        reference: The original model.
        compressed: The compressed model.
        data: Inputs to run; None to make them up.
        shapes: Shapes of made-up inputs by name.
        samples: How many inputs to make up; fewer where one is large.
        seed: Of made-up inputs.
        tolerance: Largest accepted relative L2 difference of an output, or of one of its slices, to
            the original; None to report it only.
        memory: Bytes that a session may take; None for what is available.

    Raises:
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
        ModelError: The original cannot be loaded or run.
        UsageError: `data` or `shapes` do not fit the model.
    """
    inputs = _Inputs(data, shapes or {}, samples, seed, Memory(memory))
    if _has_discrete_outputs(reference):
        taps = _taps(reference)
        try:
            return _verify(reference, compressed, inputs, tolerance, taps)
        except ModelError:
            if taps is NO_TAPS:
                raise  # else it is the copy that does not run
        return _verify(reference, compressed, inputs, tolerance, NO_TAPS)
    found = _verify(reference, compressed, inputs, tolerance, NO_TAPS)
    resized = any(metrics.resized for metrics in found.outputs.values())
    if (found.passed and not resized) or not found.agreement.outputs:
        return found
    taps = _taps(reference)
    return found if taps is NO_TAPS else _verify(reference, compressed, inputs, tolerance, taps)


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
    """What models are run on, and in how much memory; see `verify`."""

    data: Data | None
    shapes: Mapping[str, Sequence[int]]
    samples: int
    seed: int
    memory: Memory

    def load(self, model: PathLike, trial: Callable[[Feed], object]) -> list[Feed]:
        """The inputs; made-up ones are tried in the model."""
        from onnxcomp.runtime.inputs import LARGE, load_inputs, synthesize_inputs

        if self.data is not None:
            return list(load_inputs(self.data, model))
        feeds = synthesize_inputs(
            model, shapes=self.shapes, seed=self.seed, samples=self.samples, trial=trial
        )
        size = sum(array.size for array in feeds[0].values())
        return list(feeds[: max(1, 2 * LARGE // max(size, 1))])


def _has_discrete_outputs(model: PathLike) -> bool:
    """Whether an output is declared to hold something other than floats."""
    from onnxcomp.passes.analysis.taps import is_discrete
    from onnxcomp.passes.ir.model import load

    return any(is_discrete(value) for value in load(model).graph.outputs)


def _taps(model: PathLike) -> Taps:
    """What there is to look at in front of decisions."""
    from onnxcomp.passes.ir.model import load

    found = find_taps(load(model))
    return found if found.values else NO_TAPS


def _verify(
    reference: PathLike,
    compressed: PathLike,
    inputs: _Inputs,
    tolerance: float | None,
    taps: Taps,
) -> Verification:
    """`verify` with the values that are looked at in front of decisions."""
    from onnxcomp.runtime.session import needs_library

    clock = Clock()
    feeds, wanted, signature = _reference(reference, inputs, taps, clock)
    if inputs.data is not None or inputs.shapes:
        _check_outputs(wanted)
    two_forms = needs_library(compressed)
    products = _products(compressed) if two_forms else []
    int8 = any(product["precision"].i == INT8 for product in products)
    inner = (tap for tap in taps.all if tap.loop or tap.name not in signature.shapes)
    copy = Copy(compressed, tuple(inner))
    broken: list[str] = []
    clock.turn()
    memory = inputs.memory

    def run(copy: Copy, what: str, *, library: bool = True) -> list[Outputs]:
        """Outputs of one form; a form that does not run is a failure and has no outputs."""
        try:
            return memory.open(copy, what, library=library).outputs(feeds, clock)
        except ModelError as error:
            broken.append(f"{what} does not run: {error.message}")
            return []

    library = portable = run(copy, _LIBRARY)
    slowdown = clock.ratio
    exact = library
    if two_forms:
        portable = run(copy, _PORTABLE, library=False)
    if int8:
        exact = run(dataclasses.replace(copy, exact=True), _EXACT)

    def compared(first: list[Outputs], second: list[Outputs]) -> Compared:
        return compare(first, second, feeds, signature, taps)

    loss, portable_loss = compared(wanted, library), compared(wanted, portable)
    between = compared(exact, portable)
    bound = _fidelity_tolerance(products) if two_forms else 0.0
    far = judge(loss.outputs, loss.taps, tolerance, "", slices=True)
    where = "without the library, "
    portable_far = far or judge(
        portable_loss.outputs, portable_loss.taps, tolerance, where, slices=True
    )
    apart = judge(between.faithful, between.taps, bound, _BOTH)
    if apart and two_forms and not broken:
        form = memory.open(copy, _PORTABLE, library=False)
        nudged = form.outputs(_nudged(feeds), Clock())
        bound = _amplified(bound, compared(portable, nudged), feeds)
        apart = judge(between.faithful, between.taps, bound, _BOTH)
    failures = (*broken, *(far or portable_far), *apart)
    added = compared(exact, library) if int8 else None
    return Verification(
        passed=not failures,
        outputs=loss.outputs,
        portable=Form(
            not (broken or portable_far or apart), portable_loss.outputs, portable_loss.taps
        ),
        agreement=Form(not (broken or apart), between.outputs, between.taps),
        fidelity_tolerance=bound,
        failures=failures,
        samples=len(feeds),
        taps=loss.taps,
        int8=None if added is None else Form(not broken, added.outputs, added.taps),
        tolerance=tolerance,
        detections=loss.detections,
        slowdown=slowdown,
        layer_by_layer=tuple(memory.split),
    )


def _nudged(feeds: Sequence[Feed]) -> list[Feed]:
    """The inputs with every float moved by one unit of its last place, up or down."""
    import numpy as np

    rng = np.random.default_rng(0)
    moved: list[Feed] = []
    for feed in feeds:
        own = {}
        for name, array in feed.items():
            own[name] = array
            if array.dtype.kind == "f":
                up = np.asarray(rng.random(array.shape) < 0.5)
                ends = np.array([-np.inf, np.inf], array.dtype)
                own[name] = np.nextafter(array, ends[up.astype(int)])
        moved.append(own)
    return moved


def _amplified(bound: float, nudged: Compared, feeds: Sequence[Feed]) -> float:
    """The tolerance where the model makes errors of rounding larger, as 1 / x does near zero.

    Args:
        bound: For a model that does not.
        nudged: What moving the inputs by one unit of their last place does to the outputs.
        feeds: These inputs.
    """
    import numpy as np

    arrays = [array for feed in feeds for array in feed.values() if array.dtype.kind == "f"]
    unit = max((float(np.finfo(array.dtype).eps) for array in arrays), default=1.0)
    moved = [m.rel_l2 for m in (*nudged.faithful.values(), *nudged.taps.values()) if not m.problem]
    growth = max(moved, default=0.0) / unit
    return min(max(bound, bound * growth), max(bound, _MOST_AMPLIFIED))


def _reference(
    model: PathLike, inputs: _Inputs, taps: Taps, clock: Clock
) -> tuple[list[Feed], list[Outputs], Signature]:
    """Inputs, what the original makes of them, and what it declares of its outputs.

    Where all outputs would take more than `_KEPT`, or a quarter of it where memory is short,
    samples spread over the given ones are run.
    """
    form = inputs.memory.open(Copy(model, taps.all), "the original", library=True)
    wanted: list[Outputs] = []

    def trial(feed: Feed) -> None:
        wanted[:] = form.outputs([feed], clock)

    feeds = inputs.load(model, trial)
    wanted = wanted or form.outputs(feeds[:1], clock)
    size = sum(array.nbytes for array in wanted[0].values())
    kept = _KEPT // 4 if inputs.memory.split else _KEPT
    count = min(len(feeds), max(1, kept // max(size, 1)))
    feeds = [feeds[number * len(feeds) // count] for number in range(count)]
    wanted += form.outputs(feeds[1:], clock)
    return feeds, wanted, form.signature


def _check_outputs(wanted: Sequence[Outputs]) -> None:
    """Refuse inputs of which nothing comes that could differ: any model would pass."""
    import numpy as np

    arrays = [array for run in wanted for array in run.values() if array.size]
    if not arrays:
        raise UsageError(
            "the given inputs or shapes make empty outputs", hint="give inputs with rows"
        )
    floats = [array for array in arrays if is_float(array)]
    if floats and not any(np.isfinite(array).any() for array in floats):
        raise UsageError(
            "the given inputs make outputs that are NaN or infinite throughout",
            hint="give inputs that the model is made for; do they hold NaN?",
        )


def _products(model: PathLike) -> list[dict[str, onnx.AttributeProto]]:
    """Attributes of the products on codes."""
    from onnxcomp.runtime.structure import custom_nodes

    return [
        {attribute.name: attribute for attribute in node.attribute}
        for node in custom_nodes(model)
        if node.op_type.endswith(("MatMul", "Experts"))
    ]


def _fidelity_tolerance(products: Sequence[Mapping[str, onnx.AttributeProto]]) -> float:
    """Tolerance of the two forms, from the operators that compute on codes."""
    terms = max((product["extent"].ints[1] for product in products), default=1)
    kinds = {_TYPE_NAMES[product["dtype"].i] for product in products} or {"float32"}
    return max(fidelity_tolerance(len(products), terms, kind) for kind in kinds)
