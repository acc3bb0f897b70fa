"""The portable body of HyperExperts computes what numpy does, in every opset, from chosen codes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import pytest

from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper.codec import HyperCodec
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import Array, WeightSite

EXPERTS, COLUMNS, LENGTH = 3, 32, 200
OPSETS = (7, 9, 10, 11, 13, 17, 21, 23)
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((4,), ()),
    ((2, 1, 3), (2, 5)),
    ((2, 3), (2,)),
    ((1, 1), (0,)),
]


def stack_of(dtype: str = "float32") -> tuple[WeightSite, Payload]:
    rows = EXPERTS * COLUMNS
    shape = (EXPERTS, COLUMNS, LENGTH)
    site = WeightSite("w", shape, dtype, (), "", rows, LENGTH, False, experts=EXPERTS)
    sizes = (4, 7, 128, rows, LENGTH)
    geometry = hyper_format.GroupLayout(*sizes)
    rng = np.random.default_rng(0)
    tensors = {
        "codes": rng.integers(0, 256, geometry.codes_shape, dtype=np.uint8),
        "scales": rng.uniform(0.001, 0.03, geometry.scales_shape).astype(np.float16),
    }
    attributes = {"group": 128, "extent": (rows, LENGTH)}
    return site, Payload(tensors, hyper_format.shared_tensors(*sizes), attributes)


def expected(x: Array, indices: Array) -> Array:
    site, payload = stack_of()
    weight = HyperCodec().decode(site, payload).reshape(EXPERTS, COLUMNS, LENGTH)
    return np.asarray(x.astype(np.float32) @ np.swapaxes(weight[indices], -1, -2))


@pytest.fixture(scope="module")
def experts_model(two_input_model: Callable[..., onnx.ModelProto]) -> Callable[..., Any]:
    def make(opset: int, x: Array, indices: Array, dtype: str = "float32") -> onnx.ModelProto:
        site, payload = stack_of(dtype)

        def emit(builder: Any) -> Any:
            return hyper_bodies.emit_experts(builder, site, payload, "x", "i")

        functions = hyper_bodies.functions(opset)
        return two_input_model(emit, payload, opset, {"x": x, "i": indices}, dtype, functions)

    return make


def feed_of(batch: tuple[int, ...], chosen: tuple[int, ...], kind: Any = np.float32) -> Any:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((*batch, LENGTH)).astype(kind)
    return x, np.asarray(rng.integers(-EXPERTS, EXPERTS, chosen))


@pytest.mark.parametrize("opset", OPSETS)
def test_the_body_equals_products_with_gathered_matrices(
    experts_model: Callable[..., Any], run_feed: Callable[..., Array], opset: int
) -> None:
    for batch, chosen in SHAPES:
        x, indices = feed_of(batch, chosen)
        model = experts_model(opset, x, indices)
        onnx.checker.check_model(model, full_check=True)
        want = expected(x, indices)
        for optimize in (False, True):
            found = run_feed(model, {"x": x, "i": indices}, optimize=optimize)
            assert found.shape == want.shape
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("opset", [10, 17])
def test_the_reference_evaluator_agrees(experts_model: Callable[..., Any], opset: int) -> None:
    x, indices = feed_of((2, 1, 3), (2, 5))
    model = experts_model(opset, x, indices)
    (found,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x, "i": indices})
    np.testing.assert_allclose(found, expected(x, indices), rtol=0, atol=1e-3)


def test_half_precision_models_get_float16_results(
    experts_model: Callable[..., Any], run_feed: Callable[..., Array]
) -> None:
    x, indices = feed_of((2, 1, 3), (2, 5), np.float16)
    found = run_feed(experts_model(17, x, indices, "float16"), {"x": x, "i": indices})
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected(x, indices), rtol=2**-9, atol=2e-3)


def test_codes_are_picked_before_anything_is_decoded() -> None:
    """What becomes float32, of codes or scales, was gathered along the matrices before."""
    (body,) = (f for f in hyper_bodies.functions(17) if f.name == "HyperExperts")
    makers = {name: node for node in body.node for name in node.output}
    ways = [_way(makers, node.input[0]) for node in body.node if node.op_type == "Cast"]
    picked = [way for way in ways if way[-1] in ("codes", "scales") and "MatMul" not in way]
    assert [way[-1] for way in picked] == ["codes", "scales"]
    for way in picked:
        assert "Gather" in way and "Cast" not in way


def test_a_matrix_that_is_named_often_is_decoded_once() -> None:
    """Codes are picked by indices without repetitions, matrices by those of all products."""
    (body,) = (f for f in hyper_bodies.functions(17) if f.name == "HyperExperts")
    (unique,) = (node for node in body.node if node.op_type == "Unique")
    readers = [node.op_type for node in body.node if unique.output[0] in node.input]
    assert readers == ["Gather", "Gather"]


def _way(makers: dict[str, onnx.NodeProto], name: str) -> list[str]:
    """Operators from a value back along first inputs, and the input that they come from."""
    seen = []
    while name in makers:
        seen.append(makers[name].op_type)
        name = makers[name].input[0]
    return [*seen, name]


def test_matrices_that_are_no_whole_panels_are_not_told_apart() -> None:
    from onnxcomp.passes.weight import Use

    site, _ = stack_of()
    uses = (Use("n", "MatMul", 1, "experts"), Use("m", "MatMul", 1, "batch"))
    site = dataclasses.replace(site, uses=uses)
    assert HyperCodec().kinds(site) == {"experts", "batch", "weight", "decode"}
    narrow = dataclasses.replace(site, rows=3 * 24, shape=(3, 24, LENGTH))
    assert HyperCodec().kinds(narrow) == {"weight", "decode"}
