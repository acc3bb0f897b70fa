"""Pieces of a model are made of their own nodes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import helper
from tests.passes.conftest import build, weight

from onnxcomp.passes.calibration import segmented_run
from onnxcomp.passes.calibration.filed_values import filed, let_go
from onnxcomp.passes.calibration.segmented_run import Chain, segment
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.serializer import model_proto

LAYERS = 40


def function(name: str, body: Iterable[Any]) -> Any:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["x"], ["y"], list(body), imports)


def model_of_layers() -> ir.Model:
    """Layers of a product and a function that calls another one; a branch reads a weight."""
    lines = []
    for number in range(LAYERS):
        lines.append(f"p{number} = MatMul (x{number}, w{number})")
        lines.append(f"x{number + 1} = {'f.outer' if number == 1 else 'Relu'} (p{number})")
    text = "layers (float[n, 8] x0, bool go) => (float[n, 8] y) {" + "\n".join(lines)
    text += f"""
        y = If (go) <
            then_branch = some () => (float[n, 8] t) {{ t = Add (x{LAYERS}, w0) }},
            else_branch = other () => (float[n, 8] e) {{ e = Identity (x2) }}
        >
    }}"""
    functions = [
        function("outer", [helper.make_node("inner", ["x"], ["y"], domain="f")]),
        function("inner", [helper.make_node("Relu", ["x"], ["y"])]),
        function("unused", [helper.make_node("Neg", ["x"], ["y"])]),
    ]
    weights = {f"w{number}": weight(8, 8, seed=number) for number in range(LAYERS)}
    return load(build(text, weights, functions=functions))


def test_a_piece_is_made_of_its_nodes_and_what_they_read(monkeypatch: Any) -> None:
    """Models in hundreds of pieces were copied as a whole for each, which is quadratic."""
    model = model_of_layers()

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model is copied")

    monkeypatch.setattr(ir.Model, "clone", refused)
    x = weight(4, 8, seed=99)
    held = {"x0": x, "p0": x @ weight(8, 8), "go": np.array(True)}
    piece = segment(model, [1, 2, 3], ["x2"], held, {"w1": 2.0 * weight(8, 8, seed=1)})
    assert [node.op_type for node in piece.graph] == ["Relu", "MatMul", "outer"]
    assert set(piece.graph.initializers) == {"w1"}
    assert {key[1] for key in piece.functions} == {"outer", "inner"}
    session = onnxruntime.InferenceSession(model_proto(piece).SerializeToString())
    given = {value.name: held[value.name] for value in session.get_inputs()}
    assert "p0" in given
    (found,) = session.run(["x2"], given)
    wanted = np.maximum(np.maximum(held["p0"], 0) @ (2.0 * weight(8, 8, seed=1)), 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(list(model.graph)) == 2 * LAYERS + 1


def test_what_branches_read_is_read() -> None:
    model = model_of_layers()
    held = {f"x{LAYERS}": weight(4, 8), "x2": weight(4, 8, seed=2), "go": np.array(True)}
    piece = segment(model, [2 * LAYERS], ["y"], held, {})
    assert set(piece.graph.initializers) == {"w0"}
    session = onnxruntime.InferenceSession(model_proto(piece).SerializeToString())
    assert {value.name for value in session.get_inputs()} == set(held)


def test_large_values_are_held_in_files(monkeypatch: Any, tmp_path: Path) -> None:
    feeds = [{"x0": weight(4, 8, seed=n), "go": np.array(True)} for n in range(3)]
    groups = [["x1"], ["p1", "x2"], ["x5"]]
    found = []
    for most in (1 << 40, 1):
        monkeypatch.setattr(segmented_run, "_MOST_HELD", most)
        chain = Chain(model_of_layers(), feeds, groups, tmp_path)
        found.append([dict(v) for group in groups for v in chain.advance(group, final=group)])
    for one, other in zip(*found, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not list(tmp_path.iterdir())


def test_what_nothing_reads_is_not_held() -> None:
    feeds = [{"x0": weight(4, 8), "go": np.array(True)}]
    chain = Chain(model_of_layers(), feeds, [["p1"], ["p2", "x3"], ["x3"]])
    for group, final, held in (
        (["p1"], ["p1"], {"p1"}),  # the next node reads it
        (["p2", "x3"], ["p2"], {"x3"}),
    ):
        assert [set(values) for values in chain.advance(group, final=final)] == [set(group)]
        assert {*chain.held[0]} == held
    (values,) = chain.advance(["x3"])
    assert values["x3"].shape == (4, 8)


def test_values_in_files_are_those_that_were_put_there(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    found = filed(array, tmp_path)
    let_go(found)
    assert np.array_equal(found, array)
    assert filed(found[1:], tmp_path).base is not None
    assert np.shares_memory(filed(found, tmp_path), found)
    assert filed(np.zeros((0, 3)), tmp_path).shape == (0, 3)
    assert not list(tmp_path.iterdir())
