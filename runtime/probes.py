"""Questions to the installed ONNX Runtime that are answered by giving it tiny models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onnxcomp.runtime.session import import_runtime
from onnxcomp.runtime.structure import DOMAIN

if TYPE_CHECKING:
    import onnx

__all__ = ["known_operators", "latest_ir_version", "latest_opset"]

_FATAL_ONLY = 4
_TOO_NEW = 9999
_OPSET, _IR_VERSION = 17, 8  # that every supported ONNX Runtime reads


def latest_opset() -> int | None:
    """The newest opset of the default domain it promises to read; None if it does not say."""
    return _number(r"domain ai\.onnx is till opset (\d+)", _refusal(_model(opset=_TOO_NEW)))


def latest_ir_version() -> int | None:
    """The newest IR version it reads; None if it does not say."""
    return _number(r"max supported IR version: (\d+)", _refusal(_model(ir_version=_TOO_NEW)))


def known_operators(names: Iterable[str], options: Any) -> frozenset[str]:
    """Those of our operators that sessions with these options have a kernel for.

    A node without inputs is refused for its inputs where the operator is known, and for its name
    where it is not.
    """
    return frozenset(
        name for name in names if "is not a registered" not in _refusal(_model(name), options)
    )


def _refusal(model: onnx.ModelProto, options: Any = None) -> str:
    """What ONNX Runtime says against a model; nothing if it takes it."""
    runtime = import_runtime()
    if options is None:
        options = runtime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    try:
        runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the classes differ between versions and share no base
        return str(error)
    return ""


def _model(
    operator: str = "", *, opset: int = _OPSET, ir_version: int = _IR_VERSION
) -> onnx.ModelProto:
    """One node: Identity, or a custom operator without inputs."""
    from onnx import TensorProto, helper

    value, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")
    )
    if operator:
        node = helper.make_node(operator, [], ["y"], domain=DOMAIN)
    else:
        node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "probe", [value], [result])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
