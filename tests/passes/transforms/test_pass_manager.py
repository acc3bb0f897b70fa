"""What a pass says of itself is held against what it does."""

from collections.abc import Callable
from typing import ClassVar

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import CompressionError
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change, load
from onnxcomp.passes.ir.traversal import new_initializer, scopes
from onnxcomp.passes.transforms.canonical_form import CANONICAL_FORM, subgraph_bodies
from onnxcomp.passes.transforms.canonicalize import Canonicalize
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass, run_passes
from onnxcomp.passes.transforms.registry import GRAPH_PASSES

Edit = Callable[[ir.Model], object]


class Editing(GraphPass):
    """A pass that does what a test tells it."""

    name: ClassVar[str] = "editing"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def __init__(self, edit: Edit) -> None:
        self._edit = edit

    def wanted(self, settings: Settings) -> bool:
        return True

    def run(self, model: ir.Model, context: Context) -> Change:
        self._edit(model)
        return Change(1)


class Visiting(Editing):
    """The same, and it says that it goes everywhere."""

    subgraphs: ClassVar[bool] = True
    functions: ClassVar[bool] = True


def edited(model: ir.Model, edit: Edit, kind: type[Editing] = Editing) -> None:
    run_passes(model, Context(Settings()), (Canonicalize(), kind(edit)))


def branching(tools) -> ir.Model:
    """An If with two branches that read values from outside, and a function."""
    text = """
        g (float[N, 64] x, bool go) => (float[N, 64] y) {
            h = test.F (x)
            y = If (go) <
                then_branch = yes () => (float[N, 64] a) { r = Relu (h)  a = Neg (r) },
                else_branch = no () => (float[N, 64] b) { b = Mul (h, x) }
            >
        }"""
    body = onnx.helper.make_function(
        "test", "F", ["x"], ["y"], [helper.make_node("Abs", ["x"], ["y"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    return load(tools.build(text, functions=[body]))


def branches(model: ir.Model) -> list[ir.Graph]:
    return [scope.graph for scope in scopes(model) if scope.parent is not None]


def replace_operator(graph: ir.Graph | ir.Function) -> None:
    graph[0].op_type = "Exp"


def rewire(graph: ir.Graph) -> None:
    """The second node reads what the first one reads."""
    graph[1].replace_input_with(0, graph[0].inputs[0])


def give_weight(graph: ir.Graph) -> None:
    value = ir.Value(name="w", const_value=ir.tensor([1.0], name="w"))
    graph.register_initializer(value)


BODY_EDITS = (replace_operator, rewire, give_weight)


@pytest.mark.parametrize("edit", BODY_EDITS)
def test_a_pass_may_not_change_subgraphs_it_does_not_visit(tools, edit):
    with pytest.raises(CompressionError, match=r"'editing' has changed the body .* subgraphs"):
        edited(branching(tools), lambda model: edit(branches(model)[0]))
    edited(branching(tools), lambda model: edit(branches(model)[0]), Visiting)


def test_a_pass_may_not_change_functions_it_does_not_visit(tools):
    def edit(model: ir.Model) -> None:
        replace_operator(next(iter(model.functions.values())))

    with pytest.raises(CompressionError, match=r"'editing' has changed the body .* functions"):
        edited(branching(tools), edit)
    edited(branching(tools), edit, Visiting)


def test_what_a_subgraph_captures_may_change_and_dead_branches_may_go(tools):
    """Values from outside are the main graph's, which every pass visits."""

    def edit(model: ir.Model) -> None:
        first = model.graph[0]
        made = ir.node("Neg", [first.outputs[0]], name="between")
        made.outputs[0].name = "between"
        model.graph.insert_after(first, made)
        for graph in branches(model):
            graph[0].replace_input_with(0, made.outputs[0])

    model = branching(tools)
    edited(model, edit)
    assert branches(model)[0][0].inputs[0].name == "between"

    def drop(model: ir.Model) -> None:
        model.graph.outputs[0] = model.graph[0].outputs[0]
        model.graph.remove(next(node for node in model.graph if node.op_type == "If"))

    edited(model, drop)
    assert not subgraph_bodies(model)


def lend_name(model: ir.Model) -> None:
    model.graph[1].name = model.graph[0].name


def take_name(model: ir.Model) -> None:
    model.graph[0].name = None


def sink_weight(model: ir.Model) -> None:
    value = model.graph.initializers["w"]
    node = ir.node("Constant", [], {"value": ir.AttrTensor("value", value.const_value)}, name="c")
    node.outputs[0].name = "c"
    model.graph.insert_before(model.graph[0], node)
    value.replace_all_uses_with(node.outputs[0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lend_name, "two nodes are named 'p1'"),
        (take_name, "a node MatMul has no name"),
        (sink_weight, "the node 'c' holds a weight"),
    ],
)
def test_the_canonical_form_is_held_against_every_pass(tools, edit, message):
    text = "g (float[N, 64] x) => (float[N, 64] y) { h = MatMul (x, w)  y = Relu (h) }"
    proto = tools.build(text, {"w": tools.weight(64, 64)})
    proto.graph.node[0].name, proto.graph.node[1].name = "p1", "p2"
    with pytest.raises(CompressionError, match=f"after pass 'editing' {message}; canonicalize"):
        edited(load(proto), edit)
    # Before the form is ensured, nothing is asked of a pass.
    early = type("Early", (Editing,), {"requires": ()})
    run_passes(load(proto), Context(Settings()), (early(edit),))


def test_two_initializers_of_one_name_are_found(tools):
    model = branching(tools)

    def edit(model: ir.Model) -> None:
        new_initializer(model, "w", tools.weight(4, 4))
        give_weight(branches(model)[0])

    with pytest.raises(CompressionError, match="two initializers are named 'w'"):
        edited(model, edit, Visiting)


def test_a_weight_that_comes_back_in_a_function_is_found(tools):
    def edit(model: ir.Model) -> None:
        function = next(iter(model.functions.values()))
        tensor = numpy_helper.from_array(tools.weight(64, 64), "value")
        assert tensor.data_type == TensorProto.FLOAT
        attribute = ir.AttrTensor("value", ir.serde.deserialize_tensor(tensor))
        node = ir.node("Constant", [], {"value": attribute}, name="inside")
        function.insert_before(function[0], node)

    with pytest.raises(CompressionError, match="the function test::F holds a weight"):
        edited(branching(tools), edit, Visiting)


def test_every_pass_names_predicates_that_exist_and_passes_before_it():
    names: list[str] = []
    for graph_pass in GRAPH_PASSES:
        assert set(graph_pass.ensures) <= CANONICAL_FORM.keys()
        assert set(graph_pass.requires) <= set(names)
        names.append(graph_pass.name)
    assert len(set(names)) == len(names)
