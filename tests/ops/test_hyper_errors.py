"""Malformed nodes and tensors: an error status with the values in it, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

F32 = TensorProto.FLOAT
ROWS, LENGTH = 40, 200

BAD_ATTRIBUTES = [
    ({"group": None}, "'group'.*missing"),
    ({"group": 100}, "'group' is 100"),
    ({"group": 2**40}, "'group' is 1099511627776"),
    ({"group": 64}, "groups of 64"),
    ({"extent": None}, "'extent'.*missing"),
    ({"extent": [40]}, r"'extent' is \(40,\)"),
    ({"extent": [0, 200]}, r"'extent' is \(0, 200\)"),
    ({"extent": [40, -1]}, r"'extent' is \(40, -1\)"),
    ({"extent": [2**62, 200]}, "'extent' is"),
    ({"extent": [49, 200]}, r"needs \(4, 2, D, 16, 4\)"),
    ({"extent": [40, 300]}, r"needs \(3, 3, D, 16, 4\)"),
    ({"precision": 2}, "'precision' is 2"),
    ({"dtype": 10}, "'dtype' is 10"),
]
BAD_TENSORS = [
    ({"codes": np.zeros((3, 2, 16, 16), np.uint8)}, r"codes have shape \(3, 2, 16, 16\)"),
    ({"codes": np.zeros((3, 2, 16, 16, 8), np.uint8)}, "codes have shape"),
    ({"codes": np.zeros((2, 2, 16, 16, 4), np.uint8)}, "codes have shape"),
    ({"codes": np.zeros((3, 1, 16, 16, 4), np.uint8)}, "codes have shape"),
    ({"codes": np.zeros((3, 2, 0, 16, 4), np.uint8)}, "0 dwords"),
    ({"codes": np.zeros((3, 2, 15, 16, 4), np.uint8)}, "15 dwords"),
    ({"codes": np.zeros((3, 2, 28, 16, 4), np.uint8)}, "28 dwords"),
    ({"codes": np.zeros((3, 2, 24, 16, 4), np.uint8)}, "64 entries is too short for 6 bits"),
    ({"scales": np.zeros((3, 2, 16), np.float16)}, r"scales have shape \(3, 2, 16\)"),
    ({"scales": np.zeros((3, 1, 16, 1), np.float16)}, "scales have shape"),
    ({"table": np.zeros(100, np.int8)}, r"table has shape \(100,\)"),
    ({"table": np.zeros(0, np.int8)}, r"table has shape \(0,\)"),
    ({"table": np.zeros((8, 8), np.int8)}, r"table has shape \(8, 8\)"),
    ({"table": np.zeros(512, np.int8)}, r"table has shape \(512,\)"),
    ({"table": np.full(64, -128, np.int8)}, r"table\[0\] is -128"),
]


def _match(pattern: str) -> str:
    return f"(?s)HyperMatMul 'node': .*{pattern}"


@pytest.mark.parametrize(("attributes", "pattern"), BAD_ATTRIBUTES)
def test_a_bad_attribute_is_refused_when_the_session_is_created(
    hyper: Any, open_session: Callable[..., Any], attributes: Mapping[str, Any], pattern: str
) -> None:
    weight = hyper.random_weight(ROWS, LENGTH, states=6)
    model = hyper.make_model("HyperMatMul", weight, (F32, [None, None]), attributes=attributes)
    with pytest.raises(Exception, match=_match(pattern)):
        open_session(model)


@pytest.mark.parametrize(("tensors", "pattern"), BAD_TENSORS)
def test_a_bad_tensor_is_refused_when_the_session_is_created(
    hyper: Any,
    open_session: Callable[..., Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    pattern: str,
) -> None:
    weight = hyper.random_weight(ROWS, LENGTH, states=6)
    model = hyper.make_model("HyperMatMul", weight, (F32, [None, None]), tensors=tensors)
    with pytest.raises(Exception, match=_match(pattern)):
        open_session(model)


@pytest.mark.parametrize(("tensors", "pattern"), BAD_TENSORS)
def test_a_bad_tensor_made_at_run_time_is_refused_by_the_run(
    hyper: Any,
    open_session: Callable[..., Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    pattern: str,
) -> None:
    weight = hyper.random_weight(ROWS, LENGTH, states=6)
    fed = ("codes", "scales", "table")
    values = {"codes": weight.codes, "scales": weight.scales, "table": weight.table, **tensors}
    model = hyper.make_model("HyperMatMul", weight, (F32, [None, None]), tensors=tensors, fed=fed)
    session = open_session(model)
    with pytest.raises(Exception, match=_match(pattern)):
        session.run(None, {"x": np.zeros((1, LENGTH), np.float32), **values})


def test_weights_made_at_run_time_are_served(hyper: Any, open_session: Callable[..., Any]) -> None:
    weight = hyper.random_weight(ROWS, LENGTH)
    fed = ("codes", "scales", "table")
    session = open_session(hyper.make_model("HyperDecode", weight, None, fed=fed))
    feeds = {"codes": weight.codes, "scales": weight.scales, "table": weight.table}
    np.testing.assert_array_equal(session.run(None, feeds)[0], weight.dense())


@pytest.mark.parametrize("shape", [(), (0,), (199,), (3, 201), (200, 3)])
def test_activations_of_another_length_are_refused(
    hyper: Any, open_session: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    weight = hyper.random_weight(ROWS, LENGTH)
    session = open_session(hyper.make_model("HyperMatMul", weight, (F32, None)))
    with pytest.raises(Exception, match=_match("its last dim must be 200")):
        session.run(None, {"x": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("index", [40, -41, 2**40, -(2**63)])
def test_an_index_outside_the_table_is_refused(
    hyper: Any, open_session: Callable[..., Any], index: int
) -> None:
    weight = hyper.random_weight(ROWS, LENGTH)
    session = open_session(hyper.make_model("HyperGather", weight, (TensorProto.INT64, [None])))
    with pytest.raises(Exception, match=rf"HyperGather 'node': index {index} at position 1"):
        session.run(None, {"x": np.array([0, index, 1], np.int64)})


def test_columns_that_contradict_the_extent_are_refused(
    hyper: Any, open_session: Callable[..., Any]
) -> None:
    weight = hyper.random_weight(ROWS, LENGTH)
    model = hyper.make_model(
        "HyperGather", weight, (TensorProto.INT64, [None]), attributes={"columns": [7]}
    )
    with pytest.raises(Exception, match=r"'columns' is \(7,\), must be \(200,\)"):
        open_session(model)
