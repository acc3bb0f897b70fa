"""The dynamic codec: what its nodes compute, in ONNX Runtime and back, on every processor alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.integer.dynamic import DynamicCodec, DynamicParams
from onnxcomp.passes.codecs.moments import output_error
from onnxcomp.passes.weight import Array, Stats, WeightSite

SiteMaker = Callable[..., WeightSite]

CODEC = DynamicCodec()
RNG = np.random.default_rng(11)


def weight_of(rows: int, length: int) -> Array:
    return RNG.standard_normal((rows, length)).astype(np.float32)


def product_model(weight: Array, opset: int) -> onnx.ModelProto:
    """Two products of one input, as attention has them."""
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=f"p{i}") for i in range(2)]
    length = len(weight)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", "n", length])],
        [helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, None) for i in range(2)],
        [numpy_helper.from_array(weight + i, f"w{i}") for i in range(2)],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def expected_product(x: Array, weight: Array) -> Array:
    """What DynamicQuantizeLinear and a product of integers are defined to give."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / step), 0, 255)
    codes = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    payload = CODEC.encode(_site(weight), weight, DynamicParams())
    sums = codes @ payload.tensors["codes"].astype(np.float64)
    return np.asarray(sums * (step * payload.tensors["scales"]), np.float32)


def _site(weight: Array) -> WeightSite:
    rows, length = weight.shape
    return WeightSite("w", (length, rows), "float32", (), "", rows, length, True)


@pytest.mark.parametrize("opset", [10, 13, 21])
def test_products_are_those_of_integers(tmp_path: Path, opset: int) -> None:
    weight = weight_of(192, 160).T  # (length, rows), as MatMul has it
    path = tmp_path / "dense.onnx"
    onnx.save(product_model(weight, opset), path)
    small = tmp_path / "small.onnx"
    result = oc.optimize(path, small, method="dynamic", bits=8, min_size=0, verify=False)
    assert [site.method for site in result.report.sites] == ["dynamic"] * 2
    assert not {node.domain for node in onnx.load(small).graph.node} - {"", "com.microsoft"}
    session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    x = RNG.standard_normal((2, 7, 160)).astype(np.float32) + 0.3
    for i, found in enumerate(session.run(None, {"x": x})):
        wanted = expected_product(x, np.ascontiguousarray((weight + i).T))
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-4)


def test_a_model_comes_back_with_the_decoded_weights(tmp_path: Path) -> None:
    weight = weight_of(192, 160).T
    path, small, back = (tmp_path / f"{name}.onnx" for name in ("dense", "small", "back"))
    onnx.save(product_model(weight, 13), path)
    oc.optimize(path, small, method="dynamic", bits=8, min_size=0, verify=False)
    oc.expand(small, back)
    model = onnx.load(back)
    assert [node.op_type for node in model.graph.node] == ["MatMul"] * 2
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    rows = np.ascontiguousarray(weight.T)
    decoded = CODEC.decode(_site(rows), CODEC.encode(_site(rows), rows, DynamicParams()))
    assert np.array_equal(held["w0"], decoded.T)


def test_sums_of_two_products_fit_sixteen_bits() -> None:
    """Kernels of AVX2 add two products of an unsigned and a signed byte before they widen them."""
    extreme = np.array([[1.0, -1.0, 1.0, 0.5] * 8], np.float32)
    codes = CODEC.encode(_site(extreme), extreme, DynamicParams()).tensors["codes"]
    assert 2 * 255 * int(np.abs(codes.astype(np.int32)).max()) < 1 << 15


@pytest.mark.parametrize("need", ["gather", "dense"])
def test_only_weights_of_products_are_stored(make_site: SiteMaker, need: str) -> None:
    assert "products" in (CODEC.refuse(make_site(64, 64, need=need)) or "")
    assert "float16" in (CODEC.refuse(make_site(64, 64, dtype="float16")) or "")
    assert CODEC.refuse(make_site(64, 64)) is None
    with pytest.raises(UsageError, match="bits=4"):
        CODEC.check(DynamicParams(4))


def test_the_measured_error_is_that_of_the_weight_or_its_products(make_site: SiteMaker) -> None:
    site = make_site(48, 128)
    weight = np.random.default_rng(4).standard_t(3, (48, 128)).astype(np.float32)
    decoded = CODEC.decode(site, CODEC.encode(site, weight, DynamicParams()))
    (found,) = CODEC.measure(site, weight, [DynamicParams()])
    assert found == pytest.approx(
        np.linalg.norm(decoded - weight) / np.linalg.norm(weight), rel=1e-5
    )
    x = RNG.standard_normal((500, 128)) * np.geomspace(1, 0.01, 128)
    gram = x.T @ x / len(x)
    stats = Stats(site, len(x), gram, x.mean(axis=0))
    (found,) = CODEC.measure(site, weight, [DynamicParams()], stats)
    assert found == pytest.approx(output_error(weight, decoded, gram), rel=1e-6)


def test_the_codec_is_taken_by_itself_only_where_time_counts() -> None:
    from onnxcomp.passes.config.policy import Policy
    from onnxcomp.passes.config.settings import Settings

    def methods(**options: Any) -> tuple[str, ...]:
        return Policy.of(Settings(**options), ["w"]).methods

    assert "dynamic" not in methods()
    assert "dynamic" in methods(objective="latency") and "dynamic" in methods(max_slowdown=1.0)
    assert "dynamic" not in methods(objective="latency", precision="exact")
    assert "dynamic" not in methods(objective="latency", target="cuda")
    assert methods(objective="latency", stock=True) == ("int", "dynamic")
    assert CODECS["dynamic"].stock
