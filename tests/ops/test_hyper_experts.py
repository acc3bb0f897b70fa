"""HyperExperts against numpy, and against HyperMatMul with one of the matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

F32 = TensorProto.FLOAT
Array = np.ndarray[Any, Any]
RunOnAll = Callable[
    [onnx.ModelProto, Sequence[dict[str, Array]]], Iterator[tuple[str, list[Array]]]
]

# Shapes of x but for its last axis, and of the indices.
BATCHES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((), (3,)),
    ((5,), ()),
    ((1,), (2,)),
    ((3, 1, 1), (3, 2)),
    ((2, 3), (2,)),
    ((2, 1, 1), (3,)),
    ((4, 1, 30), (1, 3)),
    ((0, 1), (0,)),
    ((2, 0), (2,)),
    ((40, 1, 1), (40, 2)),
]


def stack_of(hyper: Any, experts: int, columns: int, length: int, **settings: Any) -> Any:
    return hyper.random_weight(experts * columns, length, **settings)


def model_of(
    hyper: Any,
    weight: Any,
    experts: int,
    *,
    kind: int = F32,
    index: int = TensorProto.INT64,
    attributes: Mapping[str, Any] | None = None,
    shapes: tuple[Sequence[int | str], Sequence[int | str]] | None = None,
) -> onnx.ModelProto:
    """One node; its weight is constant."""
    values = weight.inputs()
    values["stack"] = np.array([experts, weight.rows // experts], np.int64)
    given = {**weight.attributes("HyperGather"), "experts": experts, "dtype": kind}
    given |= attributes or {}
    kept = {name: value for name, value in given.items() if value is not None}
    order = ("codes", "scales", "table", "extent", "blocks", "taps", "window", "left", "right")
    names = ["x", "i", *order, "stack"]
    x, i = shapes or (None, None)
    graph = helper.make_graph(
        [helper.make_node("HyperExperts", names, ["y"], "node", domain="com.onnxcomp", **kept)],
        "graph",
        [helper.make_tensor_value_info("x", kind, x), helper.make_tensor_value_info("i", index, i)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.onnxcomp", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def matrices(weight: Any, experts: int) -> Array:
    dense: Array = weight.dense().reshape(experts, -1, weight.length)
    return dense


@pytest.mark.parametrize("index", [TensorProto.INT32, TensorProto.INT64])
def test_products_are_those_of_gathered_matrices(
    hyper: Any, run_on_all: RunOnAll, index: int
) -> None:
    experts, columns, length = 5, 48, 150
    weight = stack_of(hyper, experts, columns, length, bits=3)
    dense = matrices(weight, experts).astype(np.float64)
    rng = np.random.default_rng(0)
    dtype = np.int32 if index == TensorProto.INT32 else np.int64
    feeds = [
        {
            "x": rng.normal(size=(*batch, length)).astype(np.float32),
            "i": rng.integers(-experts, experts, chosen).astype(dtype),
        }
        for batch, chosen in BATCHES
    ]
    for _, results in run_on_all(model_of(hyper, weight, experts, index=index), feeds):
        for feed, y in zip(feeds, results, strict=True):
            want = feed["x"].astype(np.float64) @ np.swapaxes(dense[feed["i"]], -1, -2)
            assert y.shape == want.shape
            np.testing.assert_allclose(y, want, atol=2e-3 * np.sqrt(length), rtol=1e-4)


@pytest.mark.parametrize(("bits", "states", "table"), [(4, 7, ""), (2, 12, ""), (4, 8, "falling")])
def test_int8_products_are_those_of_the_product_with_one_matrix_bit_by_bit(
    hyper: Any, run_on_all: RunOnAll, bits: int, states: int, table: str
) -> None:
    """Whatever other rows there are: more rows than a tile, two in a batch, one."""
    experts, columns, length = 3, 32, 300
    weight = stack_of(hyper, experts, columns, length, bits=bits, states=states, structured=table)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 1, 1, length)).astype(np.float32)
    i = rng.integers(0, experts, (200, 2))
    every = hyper.product_int8(x.reshape(-1, length), weight).reshape(200, experts, 1, columns)
    want = np.take_along_axis(every, i[:, :, None, None], axis=1)
    attributes = {"precision": 1}
    for _, (y, one) in run_on_all(
        model_of(hyper, weight, experts, attributes=attributes),
        [{"x": x, "i": i}, {"x": x[0, 0], "i": np.array(i[0, 0])}],
    ):
        np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(one, want[0, 0])


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_types_are_those_of_the_product_with_one_matrix(
    hyper: Any, open_session: Callable[..., Any], kind: int
) -> None:
    weight = stack_of(hyper, 4, 16, 64)
    model = model_of(hyper, weight, 4, kind=kind)
    graph = model.graph
    graph.node.insert(0, helper.make_node("Cast", ["x32"], ["x"], to=kind))
    graph.node.append(helper.make_node("Cast", ["y"], ["y32"], to=F32))
    graph.input[0].CopyFrom(helper.make_tensor_value_info("x32", F32, None))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("y32", F32, None))
    x = np.random.default_rng(2).normal(size=(3, 1, 64)).astype(np.float16).astype(np.float32)
    i = np.array([3, 0, -1])
    (y,) = open_session(model).run(None, {"x32": x, "i": i})
    want = x @ np.swapaxes(matrices(weight, 4)[i], -1, -2)
    np.testing.assert_allclose(y, want, rtol=0.02, atol=0.3)


def test_threads_change_no_bit(hyper: Any, open_session: Callable[..., Any]) -> None:
    weight = stack_of(hyper, 4, 512, 1024)
    model = model_of(hyper, weight, 4)
    rng = np.random.default_rng(3)
    feed = {
        "x": rng.normal(size=(9, 1, 1, 1024)).astype(np.float32),
        "i": rng.integers(0, 4, (9, 2)),
    }
    one, two = (open_session(model, threads=n).run(None, feed)[0] for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_matrices_that_are_not_chosen_take_no_time(
    hyper: Any, open_session: Callable[..., Any]
) -> None:
    experts, length = 32, 512
    session = open_session(model_of(hyper, stack_of(hyper, experts, 256, length), experts))
    x = np.random.default_rng(4).normal(size=(1, 1, length)).astype(np.float32)

    def seconds(i: Array) -> float:
        times = []
        for _ in range(9):
            start = time.thread_time()
            session.run(None, {"x": x, "i": i})
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(np.arange(experts)) > 6 * seconds(np.array([17]))


@pytest.mark.parametrize(
    ("attributes", "pattern"),
    [
        ({"experts": None}, "'experts'.*missing"),
        ({"experts": 0}, "'experts' is 0"),
        ({"experts": -2}, "'experts' is -2"),
        ({"experts": 7}, "'experts' is 7"),
        ({"experts": 8}, "'experts' is 8"),
        ({"extent": [64, 101]}, r"'columns' is \(100,\)"),
    ],
)
def test_a_bad_attribute_is_refused(
    hyper: Any, open_session: Callable[..., Any], attributes: Mapping[str, Any], pattern: str
) -> None:
    weight = stack_of(hyper, 4, 16, 100)
    with pytest.raises(Exception, match=f"(?s)HyperExperts 'node': .*{pattern}"):
        open_session(model_of(hyper, weight, 4, attributes=attributes))


@pytest.mark.parametrize(
    ("x", "i", "pattern"),
    [
        ((1, 100), [4], r"index 4 at position 0 is outside \[-4, 3\]"),
        ((1, 100), [-5], "index -5"),
        ((1, 99), [0], r"x has shape \(1, 99\), its last dim must be 100"),
        ((2, 1, 100), [0, 1, 2], r"x has the batch \(2,\), experts have shape \(3,\)"),
    ],
)
def test_a_bad_run_is_refused(
    hyper: Any,
    open_session: Callable[..., Any],
    x: tuple[int, ...],
    i: Sequence[int],
    pattern: str,
) -> None:
    session = open_session(model_of(hyper, stack_of(hyper, 4, 16, 100), 4))
    with pytest.raises(Exception, match=pattern):
        session.run(None, {"x": np.zeros(x, np.float32), "i": np.array(i)})


@pytest.mark.parametrize(
    ("x", "i", "want"),
    [
        (("t", 1, 1, 64), ("t", 2), ["t", 2, 1, 16]),
        ((1, "m", 64), (3,), [3, "m", 16]),
        ((64,), (3, "k"), [3, "k", 16]),
    ],
)
def test_shapes_are_inferred(
    hyper: Any,
    open_session: Callable[..., Any],
    x: Sequence[int | str],
    i: Sequence[int | str],
    want: Sequence[int | str],
) -> None:
    model = model_of(hyper, stack_of(hyper, 4, 16, 64), 4, shapes=(x, i))
    assert open_session(model).get_outputs()[0].shape == want


def test_dims_that_are_not_known_to_be_equal_get_names_of_their_own(
    hyper: Any, open_session: Callable[..., Any]
) -> None:
    shapes = (("a", 1, 64), ("b",))
    model = model_of(hyper, stack_of(hyper, 4, 16, 64), 4, shapes=shapes)
    first, *rest = open_session(model).get_outputs()[0].shape
    assert first not in ("a", "b") and rest == [1, 16]
