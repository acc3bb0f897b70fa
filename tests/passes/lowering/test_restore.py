"""What a compressed model needs beside its file."""

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxcomp.passes.lowering.restore import runs_alone
from onnxcomp.passes.weight import DOMAIN


@pytest.mark.parametrize(
    ("called", "defined", "alone"),
    [
        (DOMAIN, DOMAIN, True),
        (DOMAIN, "exporter", False),
        (DOMAIN, None, False),
        ("exporter", "exporter", True),
        ("", None, True),
    ],
)
def test_a_model_runs_alone_where_it_defines_our_operators(
    called: str, defined: str | None, alone: bool
) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    imports = [helper.make_opsetid(name, 1 if name else 18) for name in ("", DOMAIN, "exporter")]
    functions = (
        [helper.make_function(defined, "Identity", ["x"], ["y"], [node], imports[:1])]
        if defined is not None
        else []
    )
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    call = helper.make_node("Identity", ["x"], ["y"], domain=called)
    graph = helper.make_graph([call], "g", [x], [y])
    model = helper.make_model(graph, functions=functions, opset_imports=imports)
    assert runs_alone(ir.from_proto(model)) is alone
