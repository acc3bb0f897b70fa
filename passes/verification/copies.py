"""Copies of a model for verification: with inner values as outputs, or with exact arithmetic.

What a model keeps in data files is read from these: only the .onnx file is written again, for as
long as the session of the copy is being made.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.passes.analysis.taps import Tap

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import onnxruntime

__all__ = ["INT8", "Copy"]

PathLike = str | os.PathLike[str]

# Where ONNX Runtime looks for the data files of a model that is given as bytes.
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"

# The value of a product's attribute `precision` that means activations rounded to int8.
INT8 = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """What to change in a model before it is run.

    Attributes:
        path: The model.
        taps: Inner values to give out; those that the model does not have are left out.
        exact: Whether products on codes leave activations as they are.
    """

    path: PathLike
    taps: tuple[Tap, ...] = ()
    exact: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing is changed."""
        return not self.taps and not self.exact

    def session(self, *, library: bool) -> tuple[onnxruntime.InferenceSession, Mapping[str, str]]:
        """A session of the copy, and the keys of taps by the names of the outputs added for them.

        Taps that are outputs of the model anyway are not added.

        Raises:
            ModelError: ONNX Runtime cannot load the copy.
            RuntimeMissingError: ONNX Runtime or the library is missing.
        """
        from onnxcomp.runtime.session import needs_library, open_session

        if self.plain:
            return open_session(self.path, library=None if library else False), {}
        from onnxcomp.runtime.structure import read_structure

        library = library and needs_library(self.path)
        proto = read_structure(self.path)
        names = self._change(proto)
        if _has_data(proto):
            return self._beside_data(proto.SerializeToString(), library), names
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "copy.onnx"
            path.write_bytes(proto.SerializeToString())
            del proto  # its weights would be in memory twice
            return open_session(path, library=library), names

    def model(self) -> tuple[ir.Model, Mapping[str, str]]:
        """The copy with its weights left in their files, and the keys of taps as for `session`."""
        from onnxcomp.passes.ir.loader import load_changed

        names: dict[str, str] = {}
        return load_changed(Path(self.path), lambda proto: names.update(self._change(proto))), names

    def _change(self, proto: onnx.ModelProto) -> dict[str, str]:
        if self.exact:
            for node in _int8_products(proto):
                _set_exact(node)
        return _add_outputs(proto, self.taps)

    def _beside_data(self, content: bytes, library: bool) -> onnxruntime.InferenceSession:
        from onnxcomp.runtime.session import import_runtime, open_session

        options = import_runtime().SessionOptions()
        options.log_severity_level = 4
        folder = os.path.dirname(os.path.abspath(self.path))
        options.add_session_config_entry(_DATA_FOLDER, folder)
        return open_session(content, library=library, session_options=options)


def _int8_products(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Products on codes that round their activations to int8."""
    from onnxcomp.runtime.structure import DOMAIN, nested_nodes

    bodies = [function.node for function in model.functions if function.domain != DOMAIN]
    for nodes in (model.graph.node, *bodies):
        for node in nested_nodes(nodes):
            if node.domain == DOMAIN and any(
                item.name == "precision" and item.i == INT8 for item in node.attribute
            ):
                yield node


def _set_exact(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "precision":
            attribute.i = 0


def _has_data(model: onnx.ModelProto) -> bool:
    from onnxcomp.runtime.structure import nested_tensors

    return any(tensor.external_data for tensor in nested_tensors(model))


def _add_outputs(model: onnx.ModelProto, taps: Iterable[Tap]) -> dict[str, str]:
    """Give inner values out; the keys of the taps by the names of the outputs."""
    import onnx

    made: dict[str, Any] = {name: node for node in model.graph.node for name in node.output}
    taken = {value.name for value in model.graph.output}
    names: dict[str, str] = {}
    for tap in taps:
        if tap.loop:
            name = _add_inner(model, made.get(tap.loop), tap)
        else:
            name = tap.name if tap.name in made else None
        if name is None:
            continue
        if name not in taken:
            taken.add(name)
            names[name] = tap.key
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return names


def _add_inner(model: onnx.ModelProto, node: onnx.NodeProto | None, tap: Tap) -> str | None:
    """Give a value of a body out; the name of what is added, None where the body has no such value.

    Args:
        model: The model.
        node: A Loop, a Scan, an If or the call of a function.
        tap: The value.
    """
    if node is None:
        return None
    if node.op_type in ("Loop", "Scan"):
        return _add_scan(node, tap)
    if node.op_type == "If":
        return _add_branch(node, tap)
    names = (node.domain, node.op_type)
    own = [function for function in model.functions if (function.domain, function.name) == names]
    return _add_result(own[0], node, tap) if own else None


def _computes(body: onnx.GraphProto | onnx.FunctionProto, tap: Tap) -> bool:
    return any(tap.name in inner.output for inner in body.node)


def _add_branch(node: onnx.NodeProto, tap: Tap) -> str | None:
    """Give a value of a branch out, as int64 or float64; nothing of it where another one runs."""
    import onnx

    branches = [item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
    if not any(_computes(branch, tap) for branch in branches):
        return None
    kind = onnx.TensorProto.INT64 if tap.whole else onnx.TensorProto.DOUBLE
    label = f"{tap.key}/value"
    for number, branch in enumerate(branches):
        name = f"{label}/{number}"
        if _computes(branch, tap):
            made = onnx.helper.make_node("Cast", [tap.name], [name], to=kind)
        else:
            nothing = onnx.TensorProto(data_type=kind, dims=[0])
            made = onnx.helper.make_node("Constant", [], [name], value=nothing)
        branch.node.append(made)
        branch.output.append(onnx.ValueInfoProto(name=name))
    node.output.append(label)
    return label


def _add_result(function: onnx.FunctionProto, node: onnx.NodeProto, tap: Tap) -> str | None:
    """Give a value of a function out; its other calls leave the result out."""
    import onnx

    if not _computes(function, tap):
        return None
    label = f"{tap.key}/value"
    node.output.extend([""] * (len(function.output) - len(node.output)))
    node.output.append(label)
    # A name of its own in the body: the value may be among its outputs already.
    function.node.append(onnx.helper.make_node("Identity", [tap.name], [label]))
    function.output.append(label)
    return label


def _add_scan(node: onnx.NodeProto, tap: Tap) -> str | None:
    """Give a value of a loop's body out, one row for each iteration; None where it has none."""
    import onnx

    (body,) = [item.g for item in node.attribute if item.name == "body"] or [onnx.GraphProto()]
    if not _computes(body, tap):
        return None
    lacking = len(body.output) - (1 if node.op_type == "Loop" else 0) - len(node.output)
    node.output.extend([""] * max(0, lacking))
    # A name of its own in the body: the value may be among its outputs already.
    label = f"{tap.key}/iterations"
    for attribute in node.attribute:  # of a Scan: one entry for each output
        if attribute.name in ("scan_output_axes", "scan_output_directions"):
            attribute.ints.append(0)
    body.node.append(onnx.helper.make_node("Identity", [tap.name], [f"{label}/each"]))
    body.output.append(onnx.ValueInfoProto(name=f"{label}/each"))
    node.output.append(label)
    return label
