"""What this machine can do with compressed models in general, and with one model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.lowering.session_memory import load_bytes
from onnxcomp.passes.report.file_findings import codes, compressed_text, form
from onnxcomp.runtime.doctor import Diagnosis, Finding, environment
from onnxcomp.runtime.machine import Machine, look

__all__ = ["doctor"]

PathLike = str | os.PathLike[str]

# Share of the available memory that trying to load a model may take.
_SHARE = 0.8


def doctor(model: PathLike | None = None) -> Diagnosis:
    """Look at what is installed, at the machine, and at a model if one is given.

    Args:
        model: A model to load here, with the operator library and without.

    Raises:
        ModelError: The file is missing or is not an ONNX model.
    """
    machine = look()
    findings = [*environment(machine), _encoders()]
    if model is not None:
        runnable = all(f.status != "problem" for f in findings if f.name == "ONNX Runtime")
        findings += _model(Path(model), machine, runnable=runnable)
    return Diagnosis(tuple(findings))


def _encoders() -> Finding:
    from onnxcomp.passes.codecs.hyper import native

    title = "encoder library"
    try:
        path = native.library_path()
        if path is not None:
            native.check()
            return Finding(title, "ok", f"{path} loads", facts={"path": str(path)})
    except CompressionError as error:
        return Finding(title, "problem", error.message, error.hint)
    hint = "install onnxcomp again with a C++17 compiler"
    return Finding(title, "note", "missing: compiling works, many times slower", hint)


def _model(path: Path, machine: Machine, *, runnable: bool) -> Iterator[Finding]:
    from onnxcomp.runtime.structure import custom_operators, model_bytes, read_structure

    proto = read_structure(path)
    operators = custom_operators(path)
    size = model_bytes(path)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    facts = {"path": str(path), "bytes": size, "opsets": opsets, "ir_version": proto.ir_version}
    model: ir.Model | None = None
    hint = ""
    try:
        model = load(path)
        kind = compressed_text(model)
    except CompressionError as error:
        kind, hint = error.message, error.hint
    text = (
        f"{path}: {size / 1e6:.1f} MB, opset {opsets.get('', '-')}, IR {proto.ir_version}, {kind}"
    )
    yield Finding("model", "note" if model is None else "ok", text, hint, facts)
    if model is not None:
        yield form(model)
    if not runnable:
        return
    yield from _formats(opsets.get("", 1), proto.ir_version)
    if operators:
        yield _kernels(operators)
        if model is not None:
            yield from codes(path, model, machine)
        yield from _on_gpu(path, machine)
        yield from _loads(path, model, operators, machine)
    else:
        yield _load(path, "model loads", library=False, needed=True)


def _formats(opset: int, ir_version: int) -> Iterator[Finding]:
    """Whether the model is newer than this ONNX Runtime."""
    from onnxcomp.runtime.probes import latest_ir_version, latest_opset

    for what, version, latest in (
        ("opset", opset, latest_opset()),
        ("IR version", ir_version, latest_ir_version()),
    ):
        if latest is None:
            continue
        facts = {"model": version, "latest": latest}
        text = f"{version}; this ONNX Runtime reads up to {latest}"
        newer = version > latest
        hint = f"update ONNX Runtime, or export the model with a lower {what}" if newer else ""
        yield Finding(what, "problem" if newer else "ok", text, hint, facts)


def _kernels(operators: Mapping[str, int]) -> Finding:
    """What runs the model's own operators."""
    from onnxcomp.ops import register
    from onnxcomp.runtime.probes import known_operators
    from onnxcomp.runtime.session import FOLDED, import_runtime

    options, hint = import_runtime().SessionOptions(), ""
    try:
        register(options)
        known = known_operators(operators, options)
    except CompressionError:
        known, hint = frozenset(), "the operator library is missing, see above"
    runs = {name: _runs(name in known, name.endswith(FOLDED)) for name in operators}
    text = "; ".join(f"{count} x {name}: {runs[name]}" for name, count in operators.items())
    missing = [name for name in runs if runs[name] == "definition"]
    if missing and not hint:
        hint = f"the library has no kernel for {', '.join(missing)}: update onnxcomp"
    facts = {name: {"nodes": count, "runs": runs[name]} for name, count in operators.items()}
    return Finding("operators", "note" if missing else "ok", text, hint if missing else "", facts)


def _on_gpu(path: Path, machine: Machine) -> Iterator[Finding]:
    """Which of the model's own nodes a GPU runs, where there is one or the library is for one."""
    from onnxcomp.ops import CUDA_OPERATORS, cuda_architectures
    from onnxcomp.runtime.session import FOLDED
    from onnxcomp.runtime.structure import custom_nodes

    try:
        held = cuda_architectures()
    except CompressionError:
        return
    if not held and not machine.gpus:
        return
    nodes = [node for node in custom_nodes(path) if not node.op_type.endswith(FOLDED)]
    fallen = [node for node in nodes if not held or node.op_type not in CUDA_OPERATORS]
    names = [node.name or f"the {node.op_type} of {node.output[0]}" for node in fallen]
    facts = {"nodes": len(nodes), "on_cpu": names}
    if fallen:
        text = f"{len(fallen)} of {len(nodes)} nodes run on the CPU: {', '.join(names)}"
        yield Finding("on a GPU", "note", text, "each one costs a copy to the CPU and back", facts)
    else:
        yield Finding("on a GPU", "ok", f"all {len(nodes)} nodes have CUDA kernels", facts=facts)


def _runs(known: bool, folded: bool) -> str:
    if folded:
        return "constant at load"
    return "kernel" if known else "definition"


def _loads(
    path: Path, model: ir.Model | None, operators: Mapping[str, int], machine: Machine
) -> Iterator[Finding]:
    """Whether both forms load."""
    from onnxcomp.runtime.session import needs_library
    from onnxcomp.runtime.structure import DOMAIN, read_structure

    if needs_library(path):
        yield _load(path, "loads with the library", library=True, needed=True)
    bodies = {body.name for body in read_structure(path).functions if body.domain == DOMAIN}
    title = "loads without the library"
    absent = sorted(operators.keys() - bodies)
    if absent:
        text = f"no: the file has no definition of {', '.join(absent)}"
        yield Finding(title, "note", text, "compress it again with portable definitions")
        return
    expected = load_bytes(path, model)
    if machine.available is not None and expected > _SHARE * machine.available:
        text = f"not tried: it takes about {expected / 1e9:.1f} GB"
        hint = f"{machine.available / 1e9:.1f} GB are available; register the operator library"
        yield Finding(title, "note", text, hint, {"expected_bytes": expected})
        return
    yield _load(path, title, library=False, needed=False, expected=expected)


def _load(
    path: Path, title: str, *, library: bool, needed: bool, expected: int | None = None
) -> Finding:
    from onnxcomp.runtime.bench import load_model

    try:
        found: dict[str, Any] = load_model(path, library=library)
    except CompressionError as error:
        hint = error.hint or "onnxcomp verify shows more"
        return Finding(title, "problem" if needed else "note", f"no: {error.message}", hint)
    if expected is not None:
        found |= {"expected_bytes": expected}
    seconds, peak = found["load_ms"] / 1e3, found["peak_rss_bytes"] / 1e9
    text = f"in {seconds:.2f} s; memory at its peak {peak:.2f} GB"
    if expected is not None:
        text += f", {expected / 1e9:.2f} GB expected"
    return Finding(title, "ok", text, facts=found)
