"""The fidelity gate: run a compressed model in both its forms and against its original.

The *library* form runs the operators of com.onnxcomp by their kernels, the *portable* form by their
definitions inside the file. Both decode the same weights, so they may differ by rounding alone.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import ModelError, VerifyError
from onnxcomp.passes.numerics import (
    MINIMUM_AGREEMENT,
    Comparison,
    Metrics,
    fidelity_tolerance,
)

if TYPE_CHECKING:
    import onnx

    from onnxcomp.runtime.evaluate import Feed, Outputs
    from onnxcomp.runtime.inputs import Data

__all__ = ["Form", "Verification", "verify"]

PathLike = str | os.PathLike[str]

# Attributes of products: TensorProto types and the value of `precision` that means int8.
_INT8 = 1
_TYPE_NAMES = {1: "float32", 10: "float16", 16: "bfloat16"}


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One comparison of outputs.

    Attributes:
        passed: Whether nothing is wrong with it.
        outputs: Metrics by output name.
    """

    passed: bool
    outputs: Mapping[str, Metrics]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        outputs = {name: metrics.to_json() for name, metrics in self.outputs.items()}
        return {"passed": self.passed, "outputs": outputs}


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        passed: Whether both forms run, agree with each other, and meet the tolerance if there is
            one.
        outputs: Library form against the original, by output name.
        portable: Portable form against the original.
        agreement: Portable form against the library form.
        fidelity_tolerance: Largest relative difference of the two forms that passes.
        failures: What is wrong, in words; empty when all passed.
        samples: How many inputs were run.
    """

    passed: bool
    outputs: Mapping[str, Metrics]
    portable: Form
    agreement: Form
    fidelity_tolerance: float
    failures: tuple[str, ...]
    samples: int

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``onnxcomp verify``."""
        return {
            **Form(self.passed, self.outputs).to_json(),
            "portable": self.portable.to_json(),
            "agreement": {**self.agreement.to_json(), "tolerance": self.fidelity_tolerance},
            "failures": list(self.failures),
            "samples": self.samples,
        }

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
) -> Verification:
    """Compare a compressed model with its original, with and without the operator library.

    One session at a time is open; outputs of the samples are kept in memory.

    Args:
        reference: The original model.
        compressed: The compressed model.
        data: Inputs to run; None to make them up.
        shapes: Shapes of made-up inputs by name.
        samples: How many inputs to make up; fewer where one is large.
        seed: Of made-up inputs.
        tolerance: Largest accepted relative L2 difference of an output to the original; None to
            report it only.

    Raises:
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
        ModelError: The original cannot be loaded or run.
        UsageError: `data` or `shapes` do not fit the model.
    """
    from onnxcomp.runtime.session import needs_library

    feeds, wanted = _reference(reference, data, shapes, samples, seed)
    two_forms = needs_library(compressed)
    broken: list[str] = []
    library = _run(compressed, feeds, broken, "the compressed model", library=True)
    portable = library
    if two_forms:
        portable = _run(compressed, feeds, broken, "without the library it", library=False)
    bound = _fidelity_tolerance(compressed) if two_forms else 0.0
    outputs, portable_outputs = _compare(wanted, library), _compare(wanted, portable)
    between = _compare(library, portable)
    far = _judge(outputs, tolerance, "")
    portable_far = far or _judge(portable_outputs, tolerance, "without the library, ")
    apart = _judge(between, bound, "with and without the library, ")
    failures = (*broken, *(far or portable_far), *apart)
    return Verification(
        passed=not failures,
        outputs=outputs,
        portable=Form(not (broken or portable_far or apart), portable_outputs),
        agreement=Form(not (broken or apart), between),
        fidelity_tolerance=bound,
        failures=failures,
        samples=len(feeds),
    )


def _reference(
    model: PathLike,
    data: Data | None,
    shapes: Mapping[str, Sequence[int]] | None,
    samples: int,
    seed: int,
) -> tuple[list[Feed], list[Outputs]]:
    """Inputs, and what the original makes of them."""
    from onnxcomp.runtime.evaluate import run_session
    from onnxcomp.runtime.inputs import LARGE, load_inputs, synthesize_inputs
    from onnxcomp.runtime.session import open_session

    session = open_session(model)
    feeds: Sequence[Feed]
    if data is not None:
        feeds = load_inputs(data, model)
    else:
        feeds = synthesize_inputs(model, shapes=shapes, seed=seed, samples=samples, session=session)
        size = sum(array.size for array in feeds[0].values())
        feeds = feeds[: max(1, 2 * LARGE // max(size, 1))]
    return list(feeds), [run_session(session, feed) for feed in feeds]


def _run(
    model: PathLike, feeds: Iterable[Feed], failures: list[str], what: str, *, library: bool
) -> list[Outputs]:
    """Outputs of one form; a form that does not run is a failure and has no outputs."""
    from onnxcomp.runtime.evaluate import run_model

    try:
        return run_model(model, feeds, library=library)
    except ModelError as error:
        failures.append(f"{what} does not run: {error.message}")
        return []


def _compare(reference: Sequence[Outputs], values: Sequence[Outputs]) -> dict[str, Metrics]:
    """Metrics of every output over all samples; nothing where a form did not run."""
    comparisons: dict[str, Comparison] = {}
    missing: set[str] = set()
    for wanted, found in zip(reference, values, strict=False):
        for name, array in wanted.items():
            comparison = comparisons.setdefault(name, Comparison(name))
            if name in found:
                comparison.add(array, found[name])
            else:
                missing.add(name)
    result = {name: comparison.result() for name, comparison in comparisons.items()}
    for name in missing:
        result[name] = dataclasses.replace(result[name], rel_l2=math.inf, problem="is missing")
    return result


def _judge(outputs: Mapping[str, Metrics], tolerance: float | None, where: str) -> list[str]:
    """What is wrong with the outputs, in words."""
    wrong = []
    for name, found in outputs.items():
        subject = f"{where}output {name!r}"
        if found.problem:
            wrong.append(f"{subject}: {found.problem}")
        elif tolerance is None:
            continue
        elif found.agreement is not None:
            if found.agreement < min(MINIMUM_AGREEMENT, 1 - tolerance):
                wrong.append(f"{subject}: only {found.agreement:.2%} of its elements agree")
        elif not found.rel_l2 <= tolerance:
            wrong.append(f"{subject}: relative difference {found.rel_l2:.3g} > {tolerance:.3g}")
    return wrong


def _fidelity_tolerance(model: PathLike) -> float:
    """Tolerance of the two forms, from the operators that compute on codes."""
    products = list(_products(model))
    terms = max((product["extent"].ints[1] for product in products), default=1)
    kinds = {_TYPE_NAMES[product["dtype"].i] for product in products} or {"float32"}
    int8 = any(product["precision"].i == _INT8 for product in products)
    return max(fidelity_tolerance(len(products), terms, kind, int8=int8) for kind in kinds)


def _products(model: PathLike) -> Iterator[dict[str, onnx.AttributeProto]]:
    """Attributes of the products on codes."""
    from onnxcomp.runtime.structure import DOMAIN, nested_nodes, read_structure

    proto = read_structure(model)
    bodies = [function.node for function in proto.functions if function.domain != DOMAIN]
    for nodes in (proto.graph.node, *bodies):
        for node in nested_nodes(nodes):
            if node.domain == DOMAIN and node.op_type.endswith("MatMul"):
                yield {attribute.name: attribute for attribute in node.attribute}
