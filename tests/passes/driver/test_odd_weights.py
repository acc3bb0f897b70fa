"""Weights of odd types and places, patterns that name nothing, and notes of nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp as oc
from onnxcomp.passes.transforms.folding_cost import LIMIT, affordable

K, N = 64, 96
RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, K))


def weight(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return np.asarray(RNG.standard_normal(shape) / np.sqrt(shape[0]), dtype)


def save(path: Path, graph: onnx.GraphProto) -> Path:
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


def doubles(path: Path, op_type: str) -> Path:
    """A product, a sum or a look-up in float64."""
    tensor, inputs = weight(K, N), ["x", "W"]
    kind, shape = TensorProto.DOUBLE, ["b", K]
    if op_type == "Add":
        shape = [K, N]
    if op_type == "Gather":
        inputs, kind, shape = ["W", "x"], TensorProto.INT64, ["b"]
    return save(
        path,
        helper.make_graph(
            [helper.make_node(op_type, inputs, ["y"], "use", doc_string="a note")],
            "g",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
            [numpy_helper.from_array(tensor, "W")],
        ),
    )


@pytest.mark.parametrize("op_type", ["MatMul", "Add", "Gather"])
@pytest.mark.parametrize("method", ["hyper", "int", "lowrank", "fp16"])
def test_float64_weights_are_stored_in_codes(op_type: str, method: str, tmp_path: Path) -> None:
    model, small = doubles(tmp_path / "m.onnx", op_type), tmp_path / "s.onnx"
    rank = ".*:rank=16" if method == "lowrank" else ()
    result = oc.optimize(model, small, method=method, min_size=0, set_=rank)
    (site,) = result.report.sites
    assert (site.method, site.dtype) == (method, "float64")
    assert site.bytes_before == 8 * int(np.prod(site.shape))
    x = {"MatMul": X, "Add": np.zeros((K, N)), "Gather": np.arange(7)}[op_type]
    wanted, found = run(model, {"x": x}), run(small, {"x": x})
    assert found.dtype == np.float64
    assert np.linalg.norm(found - wanted) <= (site.weight_error or 0.0) * 1.6 * np.linalg.norm(
        wanted
    )
    oc.expand(small, tmp_path / "e.onnx")
    np.testing.assert_allclose(run(tmp_path / "e.onnx", {"x": x}), found, rtol=1e-6, atol=1e-6)


def test_float64_weights_stay_as_they_are_where_that_is_asked_for(tmp_path: Path) -> None:
    model = doubles(tmp_path / "m.onnx", "MatMul")
    oc.optimize(model, tmp_path / "s.onnx", method="dense", min_size=0)
    assert run(tmp_path / "s.onnx", {"x": X}).tobytes() == run(model, {"x": X}).tobytes()


def test_values_that_only_float64_holds_stay(tmp_path: Path) -> None:
    model = doubles(tmp_path / "m.onnx", "MatMul")
    proto = onnx.load(model)
    large = weight(K, N) * 1e40
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(large, "W"))
    onnx.save(proto, model)
    (site,) = oc.plan(model, min_size=0).skipped
    assert site.reason == "contains values that only float64 holds"


@pytest.mark.parametrize("yes", [True, False])
def test_weights_that_a_branch_returns_are_stored_in_codes(yes: bool, tmp_path: Path) -> None:
    names = ("Wt", "Wo")
    branches = {
        f"{kind}_branch": helper.make_graph(
            [],
            kind,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [K, N])],
            [numpy_helper.from_array(weight(K, N, dtype=np.float32), name)],
        )
        for kind, name in zip(("then", "else"), names, strict=True)
    }
    model = save(
        tmp_path / "m.onnx",
        helper.make_graph(
            [
                helper.make_node("If", ["c"], ["W"], **branches),
                helper.make_node("MatMul", ["x", "W"], ["y"]),
            ],
            "g",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K]),
                helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", N])],
        ),
    )
    small = tmp_path / "s.onnx"
    result = oc.optimize(model, small, bits=4, min_size=0)
    assert {site.name: site.method for site in result.report.sites} == dict.fromkeys(names, "hyper")
    feed = {"x": X.astype(np.float32), "c": np.array(yes)}
    wanted = run(model, feed)
    assert np.linalg.norm(run(small, feed) - wanted) < 0.15 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["hyper", "int", "lowrank"])
def test_notes_of_a_node_stay_with_the_one_in_its_place(method: str, tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "W"], ["y"], "mine", doc_string="what it is")
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.origin", "line 7"
    model = save(
        tmp_path / "m.onnx",
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", N])],
            [numpy_helper.from_array(weight(K, N, dtype=np.float32), "W")],
        ),
    )
    oc.optimize(model, tmp_path / "s.onnx", method=method, min_size=0, verify=False)
    oc.expand(tmp_path / "s.onnx", tmp_path / "e.onnx")
    for name in ("s", "e"):
        (found,) = [n for n in onnx.load(tmp_path / f"{name}.onnx").graph.node if n.name == "mine"]
        notes = {item.key: item.value for item in found.metadata_props}
        assert (found.doc_string, notes["pkg.origin"]) == ("what it is", "line 7")
        assert name == "s" or set(notes) == {"pkg.origin"}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("include", ("wieght",), "--include 'wieght' matches no weight and no node"),
        ("exclude", ("layer[0-9]+",), "--exclude 'layer[0-9]+' matches no weight"),
        ("set_", ("w$:bits=6",), "--set 'w$' matches no weight"),
        ("set_", (".*:op=Conv,bits=6",), "no weight is used by Conv"),
    ],
)
def test_patterns_that_match_nothing_are_warned_of(
    option: str, value: tuple[str, ...], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = doubles(tmp_path / "m.onnx", "MatMul")
    proto = onnx.load(model)
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "weight"
    onnx.save(proto, model)
    oc.plan(model, min_size=0, **{option: value})  # type: ignore[arg-type]
    assert said in caplog.text
    if option == "include":
        assert "near it: weight" in caplog.text
    caplog.clear()
    oc.plan(model, min_size=0, include=("wei",), exclude=("use",))
    assert not caplog.text


def test_products_that_take_too_long_are_not_folded(caplog: pytest.LogCaptureFixture) -> None:
    assert affordable("A with B", 64, 64, 64)
    assert not caplog.text
    assert not affordable("A with B", 1 << 20, 1 << 20, 1 << 20)
    assert f"more than {LIMIT:.0f} s" in caplog.text


def test_bisection_of_a_model_of_labels_looks_at_what_they_are_decided_on(tmp_path: Path) -> None:
    tensors = {"A": weight(K, N, dtype=np.float32), "B": weight(N, K, dtype=np.float32)}
    model = save(
        tmp_path / "m.onnx",
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "A"], ["a"]),
                helper.make_node("Relu", ["a"], ["r"]),
                helper.make_node("MatMul", ["r", "B"], ["s"]),
                helper.make_node("ArgMax", ["s"], ["label"], axis=1, keepdims=0),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K])],
            [helper.make_tensor_value_info("label", TensorProto.INT64, ["b"])],
            [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
        ),
    )
    small = tmp_path / "s.onnx"
    options = {"min_size": 0, "set_": ("A:bits=2", "B:bits=6")}
    first = oc.optimize(model, small, precision="exact", **options)
    assert first.verify is not None and first.verify.taps["s"].rel_l2 > 0.15
    mended = oc.mend(model, small, tmp_path / "fixed.onnx", tolerance=0.1)
    assert mended.blamed == ("A",)
    assert mended.verification.passed
    gated = oc.optimize(model, tmp_path / "g.onnx", tolerance=0.1, **options)
    assert gated.verify is not None and gated.verify.taps["s"].rel_l2 < 0.1
    methods = {site.name: site.method for site in gated.report.sites}
    assert methods == {"A": "dense", "B": "hyper"}
