"""What protobuf does not check: attributes, and what ONNX Runtime has no kernels for."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir

from onnxcomp.errors import ModelError, RuntimeMissingError
from onnxcomp.ops import library_path
from onnxcomp.passes.weight import DOMAIN
from onnxcomp.runtime.machine import ISA_VARIABLE, can_run

__all__ = ["check_attributes", "check_kernels", "check_runnable"]

# Domains whose operators ONNX Runtime brings along, and ours.
_RUNTIME_DOMAINS = frozenset(
    (
        *("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"),
        *("com.microsoft", "com.microsoft.experimental", "com.microsoft.nchwc"),
        *("com.ms.internal.nhwc", "org.pytorch.aten", DOMAIN),
    )
)

_TYPES = onnx.AttributeProto.AttributeType
_ELEMENTS = frozenset(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}


def check_attributes(model: onnx.ModelProto) -> None:
    """Refuse attributes that are there twice or of another type than their operator defines.

    Names of nodes and operators, and what is noted on nodes, must be text. Inputs that an operator
    needs must be there, and an output.

    Raises:
        ModelError: There is such a node.
    """
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    versions = {entry.domain: entry.version for entry in model.opset_import}
    version = versions.get("", versions.get("ai.onnx", 1))
    for nodes in bodies:
        for node in _nested(nodes):
            _check_names(node)
            standard = node.domain in ("", "ai.onnx")
            if standard:
                _check_inputs(node, _required(node.op_type, version))
            if not node.output and (standard or node.domain == "com.microsoft"):
                raise ModelError(
                    f"node {node.name!r} ({node.op_type}) has no output",
                    hint="the file is damaged; export the model again",
                )
            kinds = _kinds(node.op_type, version) if standard else {}
            names = set()
            for attribute in node.attribute:
                _check(node, attribute, kinds.get(attribute.name))
                if attribute.name in names:
                    raise _broken(node, attribute, "there twice")
                names.add(attribute.name)


def _nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == _TYPES.GRAPH:
                yield from _nested(attribute.g.node)
            for graph in attribute.graphs:
                yield from _nested(graph.node)


def _check_names(node: onnx.NodeProto) -> None:
    for text in (node.name, node.op_type, node.domain):
        # Protobuf gives back what is no UTF-8 as bytes.
        if not isinstance(text, str):
            raise ModelError(
                f"a node or operator has a name that is not a string: {text!r}",
                hint="the file is damaged; export the model again",
            )
    for entry in node.metadata_props:
        if not isinstance(entry.key, str) or not isinstance(entry.value, str):
            raise ModelError(
                f"node {node.name or node.op_type!r} has metadata that are no strings: "
                f"{entry.key!r}: {entry.value!r}",
                hint="the file is damaged; export the model again",
            )


def _check_inputs(node: onnx.NodeProto, required: int) -> None:
    missing = [i for i in range(required) if i >= len(node.input) or not node.input[i]]
    if missing:
        raise ModelError(
            f"node {node.name!r} ({node.op_type}) has no input {missing[0]}",
            hint="the file is damaged; export the model again",
        )


@functools.lru_cache(maxsize=1024)
def _required(op_type: str, version: int) -> int:
    """Number of leading inputs that a standard operator cannot do without; 0 where unknown."""
    try:
        schema = onnx.defs.get_schema(op_type, min(max(version, 1), onnx.defs.onnx_opset_version()))
    except (onnx.defs.SchemaError, TypeError, ValueError):  # unknown, or no text at all
        return 0
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    count = 0
    for parameter in schema.inputs:
        if parameter.option != single:
            break
        count += 1
    return count


@functools.lru_cache(maxsize=1024)
def _kinds(op_type: str, version: int) -> Mapping[str, int]:
    """Attribute types of a standard operator; none where it is unknown."""
    try:
        schema = onnx.defs.get_schema(op_type, min(max(version, 1), onnx.defs.onnx_opset_version()))
    except (onnx.defs.SchemaError, TypeError, ValueError):  # unknown, or no text at all
        return {}
    kinds: dict[str, Any] = {name: found.type for name, found in schema.attributes.items()}
    return {name: int(kind) for name, kind in kinds.items()}


def _check(node: onnx.NodeProto, attribute: onnx.AttributeProto, wanted: int | None) -> None:
    found = attribute.type
    if not found or (wanted is not None and found != wanted):
        names = [_TYPES.Name(kind) for kind in (found, wanted) if kind]
        wrong = f"of type {names[0]}, must be {names[-1]}" if found else "without a type"
        raise _broken(node, attribute, wrong)
    tensors = (attribute.t,) if found == _TYPES.TENSOR else attribute.tensors
    if any(tensor.data_type not in _ELEMENTS for tensor in tensors if not attribute.ref_attr_name):
        raise _broken(node, attribute, "a tensor without an element type")


def _broken(node: onnx.NodeProto, attribute: onnx.AttributeProto, wrong: str) -> ModelError:
    return ModelError(
        f"attribute {attribute.name!r} of node {node.name or node.op_type!r} is {wrong}",
        hint="the file is damaged; export the model again",
    )


def check_kernels() -> None:
    """Refuse kernels that are asked for and do not run on this processor.

    Without the operator library nothing asks for any.

    Raises:
        RuntimeMissingError: There are none of that name here.
    """
    isa = os.environ.get(ISA_VARIABLE)
    if not isa or can_run(isa):
        return
    try:
        library_path()
    except RuntimeMissingError:
        return
    raise RuntimeMissingError(
        f"{ISA_VARIABLE} is {isa!r}, and this processor has no such kernels: "
        "the compressed model would not run",
        hint=f"unset {ISA_VARIABLE}; --target is for models that run elsewhere",
    )


def check_runnable(model: ir.Model) -> None:
    """Refuse operators that ONNX Runtime has no kernels and the model has no functions for.

    Raises:
        RuntimeMissingError: There are such operators.
    """
    bodies = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = (node for body in bodies for node in body.all_nodes())
    unknown = {
        f"{node.domain}::{node.op_type}"
        for node in nodes
        if node.domain not in _RUNTIME_DOMAINS and node.op_identifier() not in model.functions
    }
    if unknown:
        names = sorted(unknown)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RuntimeMissingError(
            f"the model needs operators of another library: {', '.join(names[:3])}{more}",
            hint="--no-verify compiles it without running it",
        )
