"""Streams behind products are found, and what they lack is summed up."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.calibration.im2col import Patches, patches
from onnxcomp.passes.calibration.residual_streams import (
    MissingSums,
    Stream,
    missing_vectors,
    stream_of,
    token_scales,
)
from onnxcomp.passes.transforms.canonicalize import canonicalize

WIDTH = 64


def block(
    *, bias: bool = True, last: str = "Add", late: bool = False, norm: bool = False
) -> ir.Model:
    """y = stream + act(stream) @ w + b; with `late` the stream is made after the product."""
    product = [
        helper.make_node("Relu", ["x" if late else "stream"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["p"]),
    ]
    stream = [helper.make_node("Tanh", ["x"], ["stream"])]
    nodes = [*product, *stream] if late else [*stream, *product]
    if bias:
        nodes.append(helper.make_node("Add", ["b", "p"], ["q"]))
    nodes.append(helper.make_node(last, ["q" if bias else "p", "stream"], ["s" if norm else "y"]))
    if norm:
        nodes.append(helper.make_node("LayerNormalization", ["s", "b"], ["y"]))
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((WIDTH, WIDTH)), "b": rng.standard_normal(WIDTH)}
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")
    ]
    fixed = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in tensors.items()]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], fixed)
    opset = helper.make_opsetid("", 17)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=8))
    canonicalize(model)
    return model


def found(model: ir.Model) -> Stream | None:
    (site,) = (site for site in find_sites(model).sites if site.name == "w")
    return stream_of(model, site)


@pytest.mark.parametrize("bias", [False, True])
def test_the_other_summand_is_the_stream(bias: bool) -> None:
    assert found(block(bias=bias)) == Stream("stream", normalised=False)
    assert found(block(bias=bias, norm=True)) == Stream("stream", normalised=True)


def test_what_is_multiplied_or_comes_later_is_no_stream() -> None:
    assert found(block(last="Mul")) is None
    assert found(block(late=True)) is None


def test_vectors_of_convolutions_have_the_order_of_their_inputs() -> None:
    rng = np.random.default_rng(0)
    stream, x = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((2, 7, 4, 3))
    cut = Patches.points(2)
    lost = missing_vectors(stream, np.zeros_like(stream), cut, 5)
    assert lost is not None
    assert patches(x, cut).shape == (24, 7)
    np.testing.assert_allclose(lost[4], stream[0, :, 1, 1], rtol=1e-6)


def test_errors_count_relative_to_the_sum_at_their_place() -> None:
    rng = np.random.default_rng(0)
    stream, x, weight = (rng.standard_normal(s) for s in ((9, 3), (9, 4), (3, 4)))
    stream[0] *= 1000.0
    scales = token_scales(stream, x, weight)
    size = np.sqrt(np.square(stream + x @ weight.T).mean(axis=1))
    np.testing.assert_allclose(scales[0, 0], 1 / size[0], rtol=1e-5)
    np.testing.assert_allclose(scales.max(), 1 / max(size.min(), 0.1 * np.median(size)), rtol=1e-5)


def test_shapes_that_do_not_fit_have_no_vectors() -> None:
    assert missing_vectors(np.ones((4, 8)), np.ones((1, 8)), None, 8) is None
    assert missing_vectors(np.ones((4, 8)), np.ones((4, 8)), None, 6) is None


def test_sums_are_means_in_the_end_and_end_where_vectors_are_missing() -> None:
    rng = np.random.default_rng(0)
    lost, x, exact = (rng.standard_normal((50, n)) for n in (3, 4, 4))
    sums = MissingSums(3, 4, held=True)
    sums.add(lost[:20], x[:20], exact[:20])
    sums.add(lost[20:], x[20:], exact[20:])
    means = sums.means()
    assert means is not None
    np.testing.assert_allclose(means.cross, lost.T @ x / 50, rtol=1e-5)
    np.testing.assert_allclose(means.reference, exact.T.dot(lost).T / 50, rtol=1e-5)
    assert means.power == pytest.approx(float(np.square(lost).sum()) / 50)
    sums.add(None, x, exact)
    assert sums.means() is None
