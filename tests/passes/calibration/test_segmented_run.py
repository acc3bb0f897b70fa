"""Pieces of a model are made of their own nodes."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import helper
from tests.passes.conftest import build, weight

from onnxcomp.passes.calibration.segmented_run import segment
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
