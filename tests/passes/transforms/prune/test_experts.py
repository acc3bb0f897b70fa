"""Whole experts and columns of their routers go; the others compute as if these were absent."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.expert_losses import Contest, least_missed
from onnxcomp.passes.transforms.prune.experts import mixtures
from onnxcomp.passes.weight import Array

EXPERTS, WIDTH, INNER = 6, 32, 48
# Experts 1 and 4 are never chosen: their offsets are far below all others.
UNUSED = (1, 4)

GATED = """
g (float[t, 32] x) => (float[t, 32] y) {
    r = Gemm <transB = 1> (x, gate, offset)
    p = Softmax <axis = -1> (r)
    v, i = TopK <axis = -1> (p, k)
    a = Constant <value_ints = [1, 2]> ()
    z = Unsqueeze (x, a)
    turned = Transpose <perm = [0, 2, 1]> (up)
    u = Gather <axis = 0> (turned, i)
    h = MatMul (z, u)
    s = Gather <axis = 0> (shift, i)
    c = Constant <value_ints = [2]> ()
    q = Unsqueeze (s, c)
    b = Add (h, q)
    e = Relu (b)
    last = Constant <value_ints = [-1]> ()
    j = Unsqueeze (i, last)
    d = GatherND (down, j)
    o = MatMul (e, d)
    f = Squeeze (o, c)
    one = Constant <value_ints = [1]> ()
    m = Unsqueeze (v, one)
    l = MatMul (m, f)
    y = Squeeze (l, one)
}
"""


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "gate": (EXPERTS, WIDTH), "up": (EXPERTS, INNER, WIDTH), "shift": (EXPERTS, INNER),
        "down": (EXPERTS, INNER, WIDTH),
    }  # fmt: skip
    found = {n: rng.standard_normal(s).astype(np.float32) / 6 for n, s in shapes.items()}
    offset = np.zeros(EXPERTS, np.float32)
    offset[list(UNUSED)] = -30
    return found | {"offset": offset, "k": np.array([2])}


def model_of(text: str = GATED, given: dict[str, Array] | None = None) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph(text)
    read = {name for node in graph.node for name in node.input}
    for name, array in (given or weights()).items():
        if name in read:
            graph.initializer.append(numpy_helper.from_array(array, name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def inputs(count: int = 8) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((16, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(model: onnx.ModelProto | Path, feed: dict[str, Array]) -> Array:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(source).run(None, feed)[0])


def pruned(tmp_path: Path, model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    onnx.save(model, tmp_path / "m.onnx")
    onnxcomp.optimize(tmp_path / "m.onnx", tmp_path / "out.onnx", method="dense", **options)
    return onnx.load(tmp_path / "out.onnx")


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


@pytest.mark.parametrize("asked", [2, 0.34])
def test_experts_that_are_never_chosen_go_and_nothing_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: float
) -> None:
    model = model_of()
    with caplog.at_level(logging.WARNING):
        out = pruned(tmp_path, model, prune_experts=asked, data=inputs())
    assert "gate chooses from 4 of 6 experts, without 1, 4" in caplog.text
    left = EXPERTS - 2
    found = shapes(out)
    assert found["gate"] == (left, WIDTH) and found["offset"] == (left,)
    assert found["down"] == (left, INNER, WIDTH) and found["up"] == (left, INNER, WIDTH)
    assert found["shift"] == (left, INNER)
    (feed,) = inputs(1)
    np.testing.assert_allclose(run(out, feed), run(model, feed), rtol=1e-4, atol=1e-5)


def test_what_is_left_chooses_as_if_the_others_were_absent(tmp_path: Path) -> None:
    given = weights()
    given["offset"] = np.array([0, 0.3, 0.1, -2, 0.2, -3], np.float32)
    out = pruned(tmp_path, model_of(given=given), prune_experts=2, data=inputs())
    absent = {**given, "offset": given["offset"] - np.array([0, 0, 0, 60, 0, 60], np.float32)}
    (feed,) = inputs(1)
    wanted = run(model_of(given=absent), feed)
    np.testing.assert_allclose(run(out, feed), wanted, rtol=1e-4, atol=1e-5)


def without(given: dict[str, Array], gone: tuple[int, int]) -> onnx.ModelProto:
    """The model with experts that are never chosen."""
    offset = given["offset"].copy()
    offset[list(gone)] = -60
    return model_of(given={**given, "offset": offset})


def test_experts_go_by_what_the_outputs_lose_and_not_by_how_often_they_are_chosen() -> None:
    given, feeds = weights(), inputs()
    # Expert 0 is chosen least, and gives most.
    given["offset"] = np.array([-1.5, 0, 0, 0, 0, 1], np.float32)
    given["down"][0] *= 60
    chosen = [np.argsort(feed["x"] @ given["gate"].T + given["offset"])[:, -2:] for feed in feeds]
    order = np.argsort(np.bincount(np.ravel(chosen), minlength=EXPERTS))
    assert order[0] == 0
    dense = [run(model_of(given=given), feed) for feed in feeds]
    power = sum(float(np.square(exact).sum()) for exact in dense)
    losses = {
        gone: sum(
            float(np.square(run(without(given, gone), feed) - exact).sum()) / power
            for feed, exact in zip(feeds, dense, strict=True)
        )
        for gone in itertools.combinations_with_replacement(range(EXPERTS), 2)
    }
    model = load(model_of(given=given))
    canonicalize(model)
    (mixture,) = mixtures(model)
    contest = Contest(mixture.node.inputs[0].name, "r", order.tolist(), 2)
    ((gone, loss),) = least_missed(model, [contest], feeds)
    assert gone[0] == min(range(EXPERTS), key=lambda expert: losses[expert, expert]) != 0
    assert loss == pytest.approx(losses[min(gone), max(gone)], rel=1e-3)


def test_weight_and_count_may_be_in_another_shape_as_exporters_leave_them(tmp_path: Path) -> None:
    text = GATED.replace(
        "r = Gemm <transB = 1> (x, gate, offset)",
        "g = Transpose <perm = [1, 0]> (gate) w = MatMul (x, g) r = Add (w, offset)",
    )
    scalar = "one = Constant <value_ints = [1]> () two = Constant <value_int = 2> ()"
    text = text.replace("v, i = TopK", f"{scalar} n = Reshape (two, one) v, i = TopK")
    text = text.replace("(p, k)", "(p, n)").replace("one = Constant <value_ints = [1]> ()\n", "")
    out = pruned(tmp_path, model_of(text), prune_experts=2, data=inputs())
    assert shapes(out)["gate"] == (EXPERTS - 2, WIDTH)
    (feed,) = inputs(1)
    np.testing.assert_allclose(run(out, feed), run(model_of(text), feed), rtol=1e-4, atol=1e-5)


def test_scores_in_half_precision_are_measured_as_well(tmp_path: Path) -> None:
    half = "r16 = Cast <to = 10> (r) p16 = Softmax <axis = -1> (r16) p = Cast <to = 1> (p16)"
    text = GATED.replace("p = Softmax <axis = -1> (r)", half)
    out = pruned(tmp_path, model_of(text), prune_experts=2, data=inputs())
    assert shapes(out)["gate"] == (EXPERTS - 2, WIDTH)


def test_without_data_the_least_columns_of_the_router_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = weights()
    given["gate"][3] *= 0.01
    with caplog.at_level(logging.WARNING):
        out = pruned(tmp_path, model_of(given=given), prune_experts=1)
    left = np.delete(given["gate"], 3, axis=0)
    (gate,) = (t for t in out.graph.initializer if t.name == "gate")
    np.testing.assert_array_equal(numpy_helper.to_array(gate), left)
    assert "give --data" in caplog.text


def test_as_many_stay_as_a_token_gets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        out = pruned(tmp_path, model_of(), prune_experts=5)
    assert shapes(out)["down"][0] == 2 and "loses 4 experts, not 5" in caplog.text


def test_what_is_left_computes_on_codes(tmp_path: Path) -> None:
    onnx.save(model_of(), tmp_path / "m.onnx")
    result = onnxcomp.optimize(
        tmp_path / "m.onnx", tmp_path / "out.onnx", bits=6, method="hyper", min_size=4096,
        prune_experts=2, data=inputs(12), tune=0,
    )  # fmt: skip
    assert result.verify is not None and result.verify.passed
    kinds = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert kinds.count("HyperExperts") == 2


OTHERS: dict[str, tuple[str, str, str]] = {
    "scores are read by others": (
        "v, i = TopK", "other = Sum (p) w = ReduceMax (p) v, i = TopK", "read by ReduceMax",
    ),
    "indices are read by others": (
        "j = Unsqueeze (i, last)", "j = Unsqueeze (i, last) w = Neg (i)", "read by Neg",
    ),
    "a router that is no product": (
        "p = Softmax <axis = -1> (r)", "n = Neg (r) p = Softmax <axis = -1> (n)",
        "no product with a weight of its own",
    ),
    "a stack that others read": (
        "e = Relu (b)", "w = ReduceMax (down) e = Relu (b)", "down is also read by others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_every_skip_has_a_reason(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, reason = OTHERS[case]
    model = model_of(GATED.replace(old, new))
    before = shapes(model)
    with caplog.at_level(logging.WARNING):
        out = pruned(tmp_path, model, prune_experts=2, data=inputs())
    assert {name: shape for name, shape in shapes(out).items() if name in before}["down"][0] == 6
    assert "stay: " in caplog.text and reason in caplog.text


def test_routers_without_stacks_have_a_reason() -> None:
    text = GATED[: GATED.index("    a = Constant")] + "    y = Gather (table, i)\n}"
    text = text.replace("float[t, 32] y", "float[t, 2, 32] y")
    given = weights() | {"table": np.zeros((40, WIDTH), np.float32)}
    model = load(model_of(text, given))
    canonicalize(model)
    (mixture,) = mixtures(model)
    assert "no stack is picked by its indices" in (mixture.reason or "")


def test_the_fused_operator_is_pruned_as_well(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "gate": (WIDTH, EXPERTS), "w1": (EXPERTS, INNER, WIDTH), "w2": (EXPERTS, WIDTH, INNER),
        "b2": (EXPERTS, WIDTH),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["r"]),
        helper.make_node(
            "MoE", ["x", "r", "w1", "", "w2", "b2"], ["y"], domain="com.microsoft", k=2
        ),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", WIDTH]) for n in "xy"]
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in arrays.items()
    ]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    out = pruned(tmp_path, model, prune_experts=1, min_size=1024)
    found = shapes(out)
    assert found["w1"][0] == found["w2"][0] == found["b2"][0] == 5 and found["gate"][1] == 5


def test_a_part_of_an_expert_is_refused() -> None:
    with pytest.raises(UsageError, match=r"prune_experts is 1\.5"):
        Settings(prune_experts=1.5)
