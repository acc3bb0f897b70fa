"""Put the bodies of our operators in the place of their calls.

``HyperMatMul(x, codes, ...)`` becomes ``MatMul(x, Reshape(...))``: operators of ONNX only, for
engines that refuse model-local functions, or ours. What depends on shared tensors alone is made
once for the whole model. Weights and uses keep their marks, so that `expand` finds the way back.
Visits the main graph and all subgraphs; other model-local functions stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.ir.manifest import (
    KEY,
    STAGE_KEY,
    USE_KEY,
    WEIGHT_KEY,
    own_name,
    read_manifest,
    shared_name,
)
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import dtype_name
from onnxcomp.passes.ir.traversal import (
    Names,
    default_opset,
    inherit_notes,
    new_initializer,
    replace_value,
    scopes,
)
from onnxcomp.passes.lowering.join_shapes import join_shapes
from onnxcomp.passes.lowering.rewrite import in_parts
from onnxcomp.passes.lowering.routes import operand, route
from onnxcomp.passes.lowering.runtime_value import FrontNodes, runtime_one
from onnxcomp.passes.lowering.split_operators import SPLIT_KINDS
from onnxcomp.passes.lowering.stages import end_waiting, kind_of, weight_body
from onnxcomp.passes.weight import DOMAIN

__all__ = ["inline_bodies", "inline_expansions"]

# What is noted on nodes that serve several weights.
_SHARED = "shared"


def inline_bodies(model: ir.Model, *, foldable: bool = True) -> Change:
    """Inline every call of an operator of ours, in place.

    Args:
        model: A model that `rewrite` made, with functions.
        foldable: Whether tools may fold codes to dense weights. If not, each payload goes through a
            Reshape whose target depends on an input of the model; weights are then decoded at
            every run.

    Returns:
        The number of calls that were inlined.

    Raises:
        ModelError: A call has no body here, or codes are not to be folded and the model has no
            input that they could depend on.
    """
    end_waiting(model)
    return _inlined(model, _calls(model), foldable=foldable)


def inline_expansions(model: ir.Model) -> Change:
    """Inline the calls that expand a whole weight when a session is created, in place.

    Those of codecs that expand weights in parts: the bodies of others are long.

    Args:
        model: A model that `rewrite` made, with functions; its weights may wait for each other.

    Returns:
        The number of calls that were inlined.
    """
    calls = [
        call
        for call in _calls(model)
        if kind_of(call.op_type) == "weight"
        and call.op_identifier() in model.functions
        and _in_parts(call.metadata_props.get(KEY, ""))
    ]
    return _inlined(model, calls, foldable=True)


def _in_parts(codec: str) -> bool:
    return codec in CODECS and CODECS[codec].row_parts is not None


def _calls(model: ir.Model) -> list[ir.Node]:
    return [node for scope in scopes(model) for node in scope.graph if node.domain == DOMAIN]


def _inlined(model: ir.Model, calls: Sequence[ir.Node], *, foldable: bool) -> Change:
    if not calls:
        return Change(0)
    missing = sorted(
        {node.op_type for node in calls if node.op_identifier() not in model.functions}
    )
    if missing:
        raise ModelError(
            f"the model has no definition of {', '.join(missing)}",
            hint="compress it again with portable definitions",
        )
    work = _Inliner(model, foldable=foldable)
    for call in calls:
        work.replace(call)
    work.finish()
    return Change(len(calls), (f"{len(calls)} calls were inlined",))


class _Inliner:
    """The state of one inlining."""

    def __init__(self, model: ir.Model, *, foldable: bool) -> None:
        self._model = model
        self._names = Names(model)
        self._front = FrontNodes(model, self._names, {KEY: _SHARED})
        self._manifest = read_manifest(model)
        self._owners = {
            own_name(name, key): name
            for name, entry in self._manifest.items()
            for key in entry.recipe.tensors
        }
        # Values that depend on shared tensors alone, and those made of them so far.
        self._shared = {
            value
            for name, value in model.graph.initializers.items()
            if name.startswith(f"{DOMAIN}::")
        }
        self._shared |= {
            value
            for node in model.graph
            if STAGE_KEY in node.metadata_props and node.op_type == "Mul"
            for value in node.outputs
        }
        self._made: dict[tuple[object, ...], ir.Value] = {}
        self._one = None if foldable else self._runtime_one()
        self._held: dict[ir.Value, ir.Value] = {}
        self._uses = self._recorded_uses()
        # What took the place of the outputs of calls.
        self._results: dict[ir.Value, ir.Value] = {}

    def _runtime_one(self) -> ir.Value:
        one = runtime_one(self._model, self._front)
        if one is None:
            raise ModelError(
                "the model has no input that decoding could depend on",
                hint="use --functions inline, whose weights tools may fold",
            )
        return one

    def _recorded_uses(self) -> dict[ir.Value, tuple[list[object], list[ir.Value]]]:
        """Marks of uses, by the result of the use, with the operands: routes will change."""
        found = {}
        for scope in scopes(self._model):
            for node in scope.graph:
                mark = json.loads(node.metadata_props.get(USE_KEY, "null"))
                if mark is not None and mark[1] not in SPLIT_KINDS:
                    ways = [mark[2], mark[4]] if mark[1] == "experts" else [mark[2]]
                    found[node.outputs[0]] = mark, [operand(node, way) for way in ways]
        return found

    def replace(self, call: ir.Node) -> None:
        """Put the body in the place of one call."""
        mark = self._use(call)
        whole = kind_of(call.op_type) == "weight"
        site, opset = self._first_owner(call.inputs[0]) if whole else "", default_opset(self._model)
        body = weight_body(self._manifest[site], call.op_type, opset) if site else None
        body = body or self._model.functions[call.op_identifier()]
        result = self._body(body, self._inputs(call), call.attributes, call)
        producer = result.producer()
        assert producer is not None and call.graph is not None
        if WEIGHT_KEY in call.metadata_props:
            producer.metadata_props[WEIGHT_KEY] = call.metadata_props[WEIGHT_KEY]
        inherit_notes(call, producer)
        if mark is not None:
            self._uses[result] = mark
        self._results[call.outputs[0]] = result
        replace_value(call.outputs[0], result)
        name = call.name
        call.graph.remove(call, safe=True)
        producer.name = name
        if kind_of(call.op_type) == "weight":
            join_shapes(result)

    def _first_owner(self, value: ir.Value | None) -> str:
        """The weight whose codes a value consists of, or begins with."""
        while value is not None and value.name not in self._owners:
            producer = value.producer()
            value = (
                None
                if producer is None or KEY not in producer.metadata_props
                else producer.inputs[0]
            )
        return "" if value is None else self._owners[value.name or ""]

    def _use(self, call: ir.Node) -> tuple[list[object], list[ir.Value]] | None:
        """How to mark what takes the place of a product or a look-up."""
        known = self._uses.pop(call.outputs[0], None)
        site = next((self._owners[v.name] for v in call.inputs if v and v.name in self._owners), "")
        kinds = ("matmul", "gather", "experts")
        kind = next((k for k in kinds if call.op_type.lower().endswith(k)), None)
        codec = CODECS.get(call.metadata_props.get(KEY, ""))
        opset = default_opset(self._model) or 0
        if known is not None or kind is None or not site:
            return known
        if codec is not None and in_parts(codec, opset):
            return None
        stored, dtype = self._manifest[site].site.dtype, "float32"
        if kind != "gather" and "dtype" in call.attributes:
            dtype = dtype_name(ir.DataType(call.attributes["dtype"].as_int()))
        sources = [v for v in call.inputs[: 2 if kind == "experts" else 1] if v is not None]
        stated = [dtype] if dtype != stored or kind == "experts" else []
        return [site, kind, [], *stated], sources

    def _inputs(self, call: ir.Node) -> list[ir.Value | None]:
        """Inputs of a call, payloads behind a Reshape where they must not be folded."""
        return [
            self._hold(value) if value is not None and value.name in self._owners else value
            for value in call.inputs
        ]

    def _hold(self, value: ir.Value) -> ir.Value:
        if self._one is None or value.shape is None:
            return value
        if value not in self._held:
            shape = self._front.ints(*value.shape.numpy())
            target = self._front.node("Mul", [shape, self._one])
            self._held[value] = self._front.node("Reshape", [value, target])
        return self._held[value]

    def _body(
        self,
        function: ir.Function,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, ir.Attr],
        place: ir.Node,
    ) -> ir.Value:
        """Make the nodes of a body in front of `place`; returns the result."""
        values: dict[ir.Value, ir.Value | None] = dict(zip(function.inputs, inputs, strict=True))
        for node in function:
            operands = [None if v is None else values[v] for v in node.inputs]
            given = _resolved(node.attributes.values(), attributes)
            if len(node.outputs) > 1:
                made = self._in_front(place, node.op_type, operands, given, len(node.outputs))
                values.update(zip(node.outputs, made, strict=True))
                continue
            if node.domain == DOMAIN:
                body = self._model.functions[node.op_identifier()]
                result = self._body(body, operands, given, place)
            elif node.op_type == "Constant":
                result = self._constant(given["value"])
            elif all(v in self._shared for v in operands):
                result = self._once(node.op_type, operands, given)
            else:
                (result,) = self._in_front(place, node.op_type, operands, given)
            values[node.outputs[0]] = result
        result_or_none = values[function.outputs[0]]
        assert result_or_none is not None
        return result_or_none

    def _constant(self, value: ir.Attr) -> ir.Value:
        """A constant of a body as an initializer, made once."""
        array = value.as_tensor().numpy()
        key = ("Constant", str(array.dtype), array.shape, array.tobytes())
        if key not in self._made:
            text = "x".join(map(str, array.reshape(-1).tolist()))
            name = self._names.value(f"{DOMAIN}::{array.dtype}.{text}")
            self._made[key] = new_initializer(self._model, name, np.array(array))
            self._shared.add(self._made[key])
        return self._made[key]

    def _once(
        self, op_type: str, operands: Sequence[ir.Value | None], attributes: Mapping[str, ir.Attr]
    ) -> ir.Value:
        """A node over shared tensors, at the start of the main graph, made once."""
        inputs = [value for value in operands if value is not None]
        settings = sorted((name, str(value.value)) for name, value in attributes.items())
        key = (op_type, *inputs, *settings)
        if key not in self._made:
            self._made[key] = self._front.node(op_type, inputs, attributes)
            self._shared.add(self._made[key])
        return self._made[key]

    def _in_front(
        self,
        place: ir.Node,
        op_type: str,
        operands: Sequence[ir.Value | None],
        attributes: Mapping[str, ir.Attr],
        count: int = 1,
    ) -> Sequence[ir.Value]:
        # Models of convolutions have many of these: long names would be a twentieth of the file.
        short = kind_of(place.op_type) == "weight"
        name = self._names.node(shared_name(op_type) if short else f"{place.name}/{op_type}")
        notes = {KEY: place.metadata_props.get(KEY, _SHARED)}
        made = ir.Node(
            "", op_type, operands, attributes.values(),
            num_outputs=count, name=name, metadata_props=notes,
        )  # fmt: skip
        for output in made.outputs:
            output.name = self._names.value(name)
        assert place.graph is not None
        place.graph.insert_before(place, made)
        return made.outputs

    def finish(self) -> None:
        """Place shared nodes, mark the uses, and drop what nothing calls any more."""
        self._front.place(STAGE_KEY)
        for result, (mark, sources) in self._uses.items():
            producer = result.producer()
            assert producer is not None
            way, *others = [route(result, self._results.get(v, v)) for v in sources]
            stated = [*mark[:2], way, *mark[3:4], *others]
            producer.metadata_props[USE_KEY] = json.dumps(stated)
        called = self._called()
        for identifier in [key for key in self._model.functions if key[0] == DOMAIN]:
            if identifier not in called:
                del self._model.functions[identifier]
        if not called:
            self._model.graph.opset_imports.pop(DOMAIN, None)

    def _called(self) -> set[ir.OperatorIdentifier]:
        """Our operators that are still called, by the model or by a body of one."""
        called = set[ir.OperatorIdentifier]()
        pending = [call.op_identifier() for call in _calls(self._model)]
        while pending:
            identifier = pending.pop()
            called.add(identifier)
            function = self._model.functions.get(identifier)
            pending += [n.op_identifier() for n in function or () if n.domain == DOMAIN]
        return called


def _resolved(attributes: Iterable[ir.Attr], given: Mapping[str, ir.Attr]) -> dict[str, ir.Attr]:
    """Attributes of a body's node, those of the call in the place of references to them."""
    found = {}
    for attribute in attributes:
        if not attribute.is_ref():
            found[attribute.name] = attribute
        elif (name := attribute.ref_attr_name) is not None and name in given:
            value = given[name]
            found[attribute.name] = ir.Attr(attribute.name, value.type, value.value)
    return found
