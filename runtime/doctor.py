"""What is installed here and what this machine offers, with what to do about each problem.

`onnxcomp.passes.report.doctor` adds what takes the compiler: its encoders, and models.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any, Literal

from onnxcomp.errors import CompressionError
from onnxcomp.runtime.machine import ISA_VARIABLE, Machine, can_run, current_isa

__all__ = ["Diagnosis", "Finding", "environment"]

Status = Literal["ok", "note", "problem"]

# Distributions that all install the module onnxruntime, the last one over the others.
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
_OLDEST = (1, 20)


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is: "ONNX Runtime".
        status: "ok"; "note" where something could be better; "problem" where something that is
            needed is missing.
        text: What was found.
        hint: What to do about it; empty where there is nothing to do.
        facts: The same for machines.
    """

    name: str
    status: Status
    text: str
    hint: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was looked at.

    Attributes:
        findings: In the order in which one depends on the other.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that is needed is missing."""
        return all(finding.status != "problem" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``onnxcomp doctor``."""
        return {"ok": self.ok, "findings": [dataclasses.asdict(one) for one in self.findings]}


def environment(machine: Machine) -> Iterator[Finding]:
    """Findings about the machine, the packages and the operator library."""
    yield from _machine(machine)
    yield _package("onnxcomp and Python", ("onnx", "onnx-ir", "numpy"), python=True)
    runtime = _runtime()
    yield runtime
    if runtime.status != "problem":
        yield from _providers(machine)
        yield _library(machine)
        yield from _cuda(machine)
    torch = _version("torch")
    text = f"torch {torch}" if torch else "not installed; only onnxcomp.models needs it"
    yield Finding("torch", "ok", text, facts={"version": torch})


def _machine(machine: Machine) -> Iterator[Finding]:
    facts = dataclasses.asdict(machine)
    text = f"{machine.processor} ({machine.architecture}), {machine.cores} cores"
    yield Finding("processor", "ok", text, facts={**facts, "gpus": list(machine.gpus)})
    if machine.memory is not None:
        free = "" if machine.available is None else f", {_gigabytes(machine.available)} available"
        yield Finding("memory", "ok", f"{_gigabytes(machine.memory)}{free}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(title: str, names: tuple[str, ...], *, python: bool) -> Finding:
    from onnxcomp.version import __version__

    found = {"onnxcomp": __version__, "python": platform.python_version()} if python else {}
    found |= {name: version for name in names if (version := _version(name))}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return Finding(title, "ok", text, facts=found)


def _runtime() -> Finding:
    from onnxcomp.runtime.session import import_runtime

    found = {name: given for name in _RUNTIMES if (given := _version(name))}
    try:
        version: str = import_runtime().__version__
    except CompressionError as error:
        return Finding("ONNX Runtime", "problem", error.message, error.hint, {"installed": found})
    except AttributeError as error:  # an empty module is left where one package was uninstalled
        hint = "uninstall all packages of ONNX Runtime, then install one of them again"
        text = f"the module is damaged: {error}"
        return Finding("ONNX Runtime", "problem", text, hint, {"installed": found})
    facts = {"version": version, "installed": found}
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST:
        hint = "pip install --upgrade 'onnxruntime>=1.20'"
        return Finding("ONNX Runtime", "problem", f"{version} is too old", hint, facts)
    if len(found) > 1:
        names = " and ".join(found)
        text = f"{version}; {names} are both installed, and the one installed last is used"
        hint = f"pip uninstall {' '.join(found)}, then install one of them again"
        return Finding("ONNX Runtime", "note", text, hint, facts)
    return Finding("ONNX Runtime", "ok", f"{version} ({next(iter(found), 'own build')})", "", facts)


def _providers(machine: Machine) -> Iterator[Finding]:
    from onnxcomp.runtime.session import import_runtime

    names: list[str] = import_runtime().get_available_providers()
    facts = {"providers": names, "gpus": list(machine.gpus)}
    short = ", ".join(name.removesuffix("ExecutionProvider") for name in names)
    yield Finding("providers", "ok", short, facts=facts)
    if machine.gpus and "CUDAExecutionProvider" not in names:
        text = f"{machine.gpus[0]}; this ONNX Runtime does not use it"
        hint = "pip uninstall onnxruntime; pip install 'onnxcomp[gpu]'"
        yield Finding("graphics processor", "note", text, hint, facts)
    elif machine.gpus:
        yield Finding("graphics processor", "ok", "; ".join(machine.gpus), facts=facts)


def _library(machine: Machine) -> Finding:
    from onnxcomp.ops import library_path, register
    from onnxcomp.runtime.session import import_runtime

    title = "operator library"
    try:
        path = library_path()
    except CompressionError as error:
        return Finding(title, "problem", error.message, error.hint)
    isa = current_isa(machine)
    facts = {"path": str(path), "bytes": path.stat().st_size, "isa": isa}
    try:
        register(import_runtime().SessionOptions())
    except CompressionError as error:
        return Finding(title, "problem", error.message, error.hint, facts)
    if not can_run(isa):
        text = f"{ISA_VARIABLE} is {isa!r}, and this processor has no such kernels: no model runs"
        return Finding(title, "problem", text, f"unset {ISA_VARIABLE}", facts)
    if isa == "plain":
        text = f"{path} loads; kernels: plain, slower than dense products"
        hint = "the fast kernels need x86-64 with AVX2, or 64-bit ARM"
        return Finding(title, "note", text, hint, facts)
    return Finding(title, "ok", f"{path} loads; kernels: {isa}", facts=facts)


def _cuda(machine: Machine) -> Iterator[Finding]:
    """What the library holds for GPUs, where it holds something or there is a GPU."""
    from onnxcomp.ops import cuda_architectures

    try:
        held = cuda_architectures()
    except CompressionError:
        return  # said of the library already
    facts = {"architectures": list(held), "driver": machine.cuda, "gpus": list(machine.gpus)}
    title = "CUDA kernels"
    if held:
        driver = f"the driver runs CUDA {machine.cuda}" if machine.cuda else "there is no driver"
        text = f"for compute capability {', '.join(held)}; {driver}"
        yield Finding(title, "ok", text, facts=facts)
    elif machine.gpus:
        text = "none in this library: its operators run on the CPU, between copies"
        hint = "with nvcc: pip install -C cmake.define.ONNXCOMP_CUDA=ON ."
        yield Finding(title, "note", text, hint, facts)
