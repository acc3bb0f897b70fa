"""HyperMatMul, HyperGather and HyperDecode against numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

F32 = TensorProto.FLOAT

SETTINGS = [
    (bits, states, group)
    for bits in range(1, 7)
    for states in (6, 7, 8, 10, 12)
    for group in (32, 64, 128, 256)
    if states >= bits + 2 and (group in (32, 256) or states in (7, 12) or bits == 4)
]
Array = np.ndarray[Any, Any]
Feeds = Sequence[dict[str, Array]]
RunOnAll = Callable[[onnx.ModelProto, Feeds], Iterator[tuple[str, list[Array]]]]
SHAPES = [(1, 1), (15, 100), (16, 128), (17, 129), (33, 300)]


@pytest.mark.parametrize(("bits", "states", "group"), SETTINGS)
def test_decode_equals_the_definition_bit_by_bit(
    hyper: Any, run_on_all: RunOnAll, bits: int, states: int, group: int
) -> None:
    for rows, length in ((33, group + 17), (5, 3 * group)):
        weight = hyper.random_weight(rows, length, bits=bits, states=states, group=group)
        want = weight.dense()
        for _, (decoded,) in run_on_all(hyper.make_model("HyperDecode", weight, None), [{}]):
            np.testing.assert_array_equal(decoded, want)


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.INT64])
def test_gather_equals_rows_of_the_definition(
    hyper: Any, open_session: Callable[..., Any], rows: int, length: int, kind: int
) -> None:
    weight = hyper.random_weight(rows, length, bits=3)
    session = open_session(hyper.make_model("HyperGather", weight, (kind, [None, None])))
    dtype = np.int32 if kind == TensorProto.INT32 else np.int64
    indices = np.array([[0, rows - 1, -1], [-rows, rows // 2, 0]], dtype)
    (out,) = session.run(None, {"x": indices})
    np.testing.assert_array_equal(out, weight.dense()[indices])
    (none,) = session.run(None, {"x": np.zeros((0, 4), dtype)})
    assert none.shape == (0, 4, length)


def test_gather_takes_a_scalar_index(hyper: Any, open_session: Callable[..., Any]) -> None:
    weight = hyper.random_weight(20, 40, group=32)
    session = open_session(hyper.make_model("HyperGather", weight, (TensorProto.INT64, [])))
    (out,) = session.run(None, {"x": np.array(-3, np.int64)})
    np.testing.assert_array_equal(out, weight.dense()[-3])


# What a table is like, by arguments of `random_weight`: kernels have forms of their own for each.
TABLES: dict[str, dict[str, bool]] = {"any": {}, "odd": {"odd": True}, "leveled": {"leveled": True}}
BATCHES = (1, 2, 3, 4, 7, 17, 30)


@pytest.mark.parametrize(
    ("bits", "states", "group", "kind"),
    [(*s, kind) for s in SETTINGS for kind in TABLES if kind != "leveled" or s[1] > 8],
)
def test_int8_product_equals_its_formula_bit_by_bit(
    hyper: Any, run_on_all: RunOnAll, bits: int, states: int, group: int, kind: str
) -> None:
    weight = hyper.random_weight(
        35, group + 9, bits=bits, states=states, group=group, **TABLES[kind]
    )
    model = hyper.make_model(
        "HyperMatMul", weight, (F32, [None, None]), attributes={"precision": 1}
    )
    rng = np.random.default_rng(bits + states + group)
    inputs = [rng.normal(size=(m, weight.length)).astype(np.float32) for m in BATCHES]
    want = hyper.product_int8(np.concatenate(inputs), weight)
    for _, results in run_on_all(model, [{"x": x} for x in inputs]):
        np.testing.assert_array_equal(np.concatenate(results), want)


@pytest.mark.parametrize("kind", ["falling", "sloped", "twisted", "turned"])
@pytest.mark.parametrize(("bits", "states"), [(2, 6), (2, 8), (3, 7), (3, 10), (4, 8), (4, 7)])
def test_products_of_structured_tables_are_those_of_any_table(
    hyper: Any, run_on_all: RunOnAll, bits: int, states: int, kind: str
) -> None:
    for group in (32, 128):
        weight = hyper.random_weight(
            35, 2 * group + 9, bits=bits, states=states, group=group, structured=kind
        )
        rng = np.random.default_rng(bits + states + group)
        inputs = [rng.normal(size=(m, weight.length)).astype(np.float32) for m in BATCHES]
        x = np.concatenate(inputs)
        dense = x.astype(np.float64) @ weight.dense().astype(np.float64).T
        for precision in (0, 1):
            attributes = {"precision": precision}
            model = hyper.make_model(
                "HyperMatMul", weight, (F32, [None, None]), attributes=attributes
            )
            want = hyper.product_int8(x, weight) if precision == 1 else dense
            bound = 0.0 if precision == 1 else hyper.exact_bound(x, weight)
            for _, results in run_on_all(model, [{"x": one} for one in inputs]):
                assert np.all(np.abs(np.concatenate(results) - want) <= bound)


def test_structured_tables_that_are_fed_at_run_time_are_served_as_any(
    hyper: Any, run_on_all: RunOnAll
) -> None:
    weight = hyper.random_weight(35, 300, bits=4, states=8, structured="falling")
    attributes = {"precision": 1}
    model = hyper.make_model(
        "HyperMatMul", weight, (F32, [None, None]), attributes=attributes, fed=["table"]
    )
    x = np.random.default_rng(3).normal(size=(5, 300)).astype(np.float32)
    want = hyper.product_int8(x, weight)
    for _, (y,) in run_on_all(model, [{"x": x, "table": weight.table}]):
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(("bits", "states", "group"), SETTINGS)
def test_exact_product_is_within_float32_rounding(
    hyper: Any, run_on_all: RunOnAll, bits: int, states: int, group: int
) -> None:
    kind = "leveled" if states > 8 and group > 32 else "odd"
    weight = hyper.random_weight(
        35, group + 9, bits=bits, states=states, group=group, **TABLES[kind]
    )
    model = hyper.make_model("HyperMatMul", weight, (F32, [None, None]))
    rng = np.random.default_rng(bits + states + group)
    inputs = [rng.normal(size=(m, weight.length)).astype(np.float32) for m in BATCHES]
    x = np.concatenate(inputs)
    want = x.astype(np.float64) @ weight.dense().astype(np.float64).T
    for _, results in run_on_all(model, [{"x": x} for x in inputs]):
        assert np.all(np.abs(np.concatenate(results) - want) <= hyper.exact_bound(x, weight))


@pytest.mark.parametrize("precision", [0, 1])
def test_large_batches_and_wide_weights_are_cut_into_tasks_without_seams(
    hyper: Any, run_on_all: RunOnAll, precision: int
) -> None:
    for rows, length, m in ((97, 200, 1300), (1200, 2100, 9)):
        weight = hyper.random_weight(rows, length, odd=True)
        model = hyper.make_model(
            "HyperMatMul", weight, (F32, [None, None]), attributes={"precision": precision}
        )
        x = np.random.default_rng(m).normal(size=(m, length)).astype(np.float32)
        want = x.astype(np.float64) @ weight.dense().astype(np.float64).T
        if precision == 1:
            want = hyper.product_int8(x, weight)
        for _, (y,) in run_on_all(model, [{"x": x}]):
            bound = 0.0 if precision == 1 else hyper.exact_bound(x, weight)
            assert np.all(np.abs(y - want) <= bound)


def test_an_unknown_instruction_set_is_refused_by_name(
    hyper: Any, open_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXCOMP_ISA", "mmx")
    model = hyper.make_model("HyperDecode", hyper.random_weight(1, 32, group=32), None)
    with pytest.raises(Exception, match="ONNXCOMP_ISA is 'mmx', must be plain"):
        open_session(model)


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize("precision", [0, 1])
def test_any_batch_shape_is_kept(
    hyper: Any, open_session: Callable[..., Any], rows: int, length: int, precision: int
) -> None:
    weight = hyper.random_weight(rows, length)
    rng = np.random.default_rng(7)
    for shape in ((), (1,), (3,), (2, 5), (0,), (3, 0, 2), (1, 1, 1, 2)):
        x = rng.normal(size=(*shape, length)).astype(np.float32)
        model = hyper.make_model(
            "HyperMatMul", weight, (F32, [None] * x.ndim), attributes={"precision": precision}
        )
        (y,) = open_session(model).run(None, {"x": x})
        assert y.shape == (*shape, rows)
        flat = x.reshape(-1, length)
        want = flat.astype(np.float64) @ weight.dense().astype(np.float64).T
        if precision == 1:
            np.testing.assert_array_equal(y.reshape(-1, rows), hyper.product_int8(flat, weight))
        else:
            bound = hyper.exact_bound(flat, weight)
            assert np.all(np.abs(y.reshape(-1, rows) - want) <= bound)


def _round_to(y: Array, kind: int) -> Array:
    """To the 16-bit type and back, to nearest even."""
    if kind == TensorProto.FLOAT16:
        with np.errstate(over="ignore"):
            return y.astype(np.float16).astype(np.float32)
    bits = y.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return (bits << np.uint32(16)).view(np.float32)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_activations_are_rounded_once_to_nearest_even(
    hyper: Any, run_on_all: RunOnAll, kind: int
) -> None:
    weight = hyper.random_weight(33, 300)
    model = hyper.make_model(
        "HyperMatMul", weight, (F32, [None, None]), attributes={"precision": 1}, cast=kind
    )
    rng = np.random.default_rng(3)
    # Down to subnormal halves, up to overflow: powers of two times what both types represent.
    x = rng.normal(size=(24, 300)) * np.repeat([2.0**-24, 2.0**-12, 1.0, 2.0**12], 6)[:, None]
    x = _round_to(x.astype(np.float32), kind)
    want = _round_to(hyper.product_int8(x, weight), kind)
    for _, (y,) in run_on_all(model, [{"x": x}]):
        np.testing.assert_array_equal(y, want)


def test_half_input_and_output_need_no_casts(hyper: Any, open_session: Callable[..., Any]) -> None:
    weight = hyper.random_weight(16, 64, group=64)
    session = open_session(
        hyper.make_model("HyperMatMul", weight, (TensorProto.FLOAT16, ["batch", 64]))
    )
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float16)
    (y,) = session.run(None, {"x": x})
    assert y.dtype == np.float16
    want = x.astype(np.float64) @ weight.dense().astype(np.float64).T
    np.testing.assert_allclose(y, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("precision", [0, 1])
def test_nan_activations_spoil_their_own_row_only(
    hyper: Any, run_on_all: RunOnAll, precision: int
) -> None:
    weight = hyper.random_weight(20, 200)
    model = hyper.make_model(
        "HyperMatMul", weight, (F32, [None, None]), attributes={"precision": precision}
    )
    x = np.ones((3, 200), np.float32)
    x[1, 7], x[2] = np.nan, 0.0
    for _, (y,) in run_on_all(model, [{"x": x}]):
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()
        assert not y[2].any()


def test_scales_of_any_bits_give_what_numpy_gives(hyper: Any, run_on_all: RunOnAll) -> None:
    weight = hyper.random_weight(32, 256)
    special = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00], np.uint16)
    weight.scales.reshape(-1)[:8] = special.view(np.float16)
    with np.errstate(invalid="ignore"):
        want = weight.dense()
    for _, (decoded,) in run_on_all(hyper.make_model("HyperDecode", weight, None), [{}]):
        np.testing.assert_array_equal(decoded, want)


def test_symbolic_batch_dims_reach_the_graph_output(
    hyper: Any, open_session: Callable[..., Any]
) -> None:
    weight = hyper.random_weight(24, 64, group=64)
    session = open_session(hyper.make_model("HyperMatMul", weight, (F32, ["batch", "time", 64])))
    assert session.get_outputs()[0].shape == ["batch", "time", 24]
    session = open_session(
        hyper.make_model("HyperGather", weight, (TensorProto.INT64, ["batch", "time"]))
    )
    assert session.get_outputs()[0].shape == ["batch", "time", 64]
    session = open_session(hyper.make_model("HyperDecode", weight, None))
    assert session.get_outputs()[0].shape == [24, 64]


@pytest.mark.parametrize("op", ["HyperMatMul", "HyperGather"])
def test_an_input_of_unknown_rank_is_served(
    hyper: Any, open_session: Callable[..., Any], op: str
) -> None:
    weight = hyper.random_weight(24, 64, group=64)
    kind = TensorProto.FLOAT16 if op == "HyperMatMul" else TensorProto.INT64
    session = open_session(hyper.make_model(op, weight, (kind, None)))
    x = np.zeros((2, 3, 64), np.float16) if op == "HyperMatMul" else np.zeros((2, 3), np.int64)
    (y,) = session.run(None, {"x": x})
    assert y.shape == ((2, 3, 24) if op == "HyperMatMul" else (2, 3, 64))
