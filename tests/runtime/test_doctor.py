"""The doctor finds what is there, what is missing, and says what to do."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.passes.report import doctor
from onnxcomp.runtime import doctor as environment
from onnxcomp.runtime import machine, probes
from onnxcomp.runtime.doctor import Diagnosis, Finding


def by_name(found: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in found.findings}


def run(program: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.usefixtures("library")
def test_a_whole_installation_is_well(twins: tuple[Path, Path]) -> None:
    found = onnxcomp.doctor(twins[1])
    findings = by_name(found)
    assert found.ok
    assert findings["operator library"].facts["isa"] == machine.look().isa
    assert findings["operators"].facts == {
        "HyperGather": {"nodes": 1, "runs": "kernel"},
        "HyperMatMul": {"nodes": 1, "runs": "kernel"},
    }
    for title in ("loads with the library", "loads without the library"):
        assert findings[title].status == "ok" and findings[title].facts["load_ms"] > 0
    assert all(f.hint for f in found.findings if f.status != "ok")


def test_a_dense_model_is_loaded_once(twins: tuple[Path, Path]) -> None:
    findings = by_name(onnxcomp.doctor(twins[0]))
    assert findings["model loads"].status == "ok"
    assert not findings.keys() & {"operators", "loads with the library"}


@pytest.mark.usefixtures("no_library")
def test_without_the_library_the_definitions_run(twins: tuple[Path, Path]) -> None:
    found = onnxcomp.doctor(twins[1])
    findings = by_name(found)
    assert not found.ok
    assert findings["operator library"].status == "problem"
    assert findings["operators"].facts["HyperMatMul"]["runs"] == "definition"
    assert findings["loads with the library"].status == "problem"
    assert findings["loads without the library"].status == "ok"


def test_a_model_without_definitions_needs_the_library(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    model = onnx.load(twins[1])
    del model.functions[:]
    onnx.save(model, tmp_path / "bare.onnx")
    finding = by_name(onnxcomp.doctor(tmp_path / "bare.onnx"))["loads without the library"]
    assert finding.status == "note" and "HyperGather, HyperMatMul" in finding.text


def test_a_model_newer_than_the_runtime(twins: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(twins[0])
    model.opset_import[0].version = 999
    onnx.save(model, tmp_path / "new.onnx")
    found = onnxcomp.doctor(tmp_path / "new.onnx")
    findings = by_name(found)
    assert not found.ok and findings["opset"].status == "problem"
    assert findings["IR version"].status == "ok" and findings["model loads"].status == "problem"


def test_loading_that_would_not_fit_is_not_tried(
    twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(machine.look(), available=1 << 20)
    monkeypatch.setattr(doctor, "look", lambda: small)
    finding = by_name(onnxcomp.doctor(twins[1]))["loads without the library"]
    assert finding.status == "note" and "not tried" in finding.text


def test_the_expected_memory_is_near_the_truth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"w{index}" for index in range(6)]
    weights = [rng.standard_normal((512, 512)).astype(np.float32) / 16 for _ in names]
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    graph = helper.make_graph(
        [
            node
            for index, name in enumerate(names)
            for node in (
                helper.make_node("MatMul", [f"x{index}", name], [f"y{index}"]),
                helper.make_node("Relu", [f"y{index}"], [f"x{index + 1}"]),
            )
        ],
        "chain",
        [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, ["n", 512])],
        [helper.make_tensor_value_info("x6", onnx.TensorProto.FLOAT, ["n", 512])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
    )
    imports = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    path = tmp_path / "small.onnx"
    onnxcomp.optimize(model, path, method="hyper", bits=2, verify=False)
    facts = by_name(onnxcomp.doctor(path))["loads without the library"].facts
    assert facts["expected_bytes"] > 5 * 6 * weights[0].nbytes
    assert 0.5 < facts["peak_rss_bytes"] / facts["expected_bytes"] < 2


@pytest.mark.parametrize("record", ["{", '{"version": 99}', '{"version": 1, "recipes": []}'])
def test_a_damaged_record_does_not_stop_the_doctor(
    twins: tuple[Path, Path], tmp_path: Path, record: str
) -> None:
    model = onnx.load(twins[1])
    model.metadata_props.add(key="onnxcomp", value=record)
    onnx.save(model, tmp_path / "m.onnx")
    findings = by_name(onnxcomp.doctor(tmp_path / "m.onnx"))
    assert findings["loads without the library"].status == "ok"


def test_a_missing_or_damaged_file_is_an_invalid_model(tmp_path: Path) -> None:
    with pytest.raises(onnxcomp.errors.ModelError):
        onnxcomp.doctor(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(onnxcomp.errors.ModelError):
        onnxcomp.doctor(tmp_path / "bad.onnx")


def test_without_onnx_runtime_the_rest_is_looked_at(twins: tuple[Path, Path]) -> None:
    program = """
        import sys
        sys.modules["onnxruntime"] = None
        sys.argv = ["onnxcomp", "doctor", sys.argv[1]]
        from onnxcomp.cli import main
        main()
    """
    done = run(program, twins[1])
    assert done.returncode == 6, done.stderr
    assert "PROBLEM ONNX Runtime: ONNX Runtime cannot be imported" in done.stdout
    assert "-> pip install 'onnxcomp[cpu]'" in done.stdout
    assert "encoder library" in done.stdout and "model: " in done.stdout
    assert "1 problem" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("installed", "version", "status", "words"),
    [
        (["onnxruntime"], "1.31.1", "ok", "1.31.1 (onnxruntime)"),
        (["onnxruntime-gpu"], "1.20.0", "ok", "(onnxruntime-gpu)"),
        (["onnxruntime", "onnxruntime-gpu"], "1.31.1", "note", "both installed"),
        (["onnxruntime"], "1.9.0", "problem", "too old"),
        ([], "1.24.0", "ok", "own build"),
    ],
)
def test_runtimes_of_all_kinds(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], version: str, status: str, words: str
) -> None:
    def found(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(__version__=version))
    finding = environment._runtime()
    assert finding.status == status and words in finding.text
    assert bool(finding.hint) == (status != "ok")


def test_a_graphics_processor_without_a_provider_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    here = dataclasses.replace(machine.look(), gpus=("NVIDIA H200, 143771 MiB, 580.1",))
    for names, status in ((["CPUExecutionProvider"], "note"), (["CUDAExecutionProvider"], "ok")):
        runtime = SimpleNamespace(get_available_providers=lambda names=names: names)
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        assert list(environment._providers(here))[-1].status == status


def test_the_machine_is_known() -> None:
    here = machine.look()
    assert here.cores >= 1 and here.processor and here.architecture
    if here.memory is not None:
        assert here.memory > 1 << 28
    assert machine.isa_of(frozenset()) == "plain"
    assert machine.isa_of(frozenset({"avx2", "fma", "f16c"})) == "avx2"
    assert machine.isa_of(frozenset({"avx2", "fma", "f16c", "avx_vnni"})) == "avx2vnni"
    assert machine.isa_of(frozenset({"fp", "asimd", "asimddp"})) == "neondot"


@pytest.mark.usefixtures("library")
def test_the_form_of_the_kernels_is_what_the_library_chooses(twins: tuple[Path, Path]) -> None:
    """The best form that the library accepts on this machine is the one that is named."""
    program = """
        import sys, onnxcomp
        onnxcomp.InferenceSession(sys.argv[1])
    """
    best = next(
        form
        for form in ("avx512", "avx2vnni", "avx2", "neondot", "neon", "plain")
        if run(program, twins[1], ONNXCOMP_ISA=form).returncode == 0
    )
    assert machine.look().isa == best


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("isa", "flags", "status"),
    [
        ("amx", {"avx2", "fma", "f16c"}, "problem"),
        ("amx", {*machine._FORMS[0][1], "amx_tile", "amx_int8"}, "ok"),
        ("avx9", {"avx2", "fma", "f16c"}, "problem"),
        ("neon", {"avx2", "fma", "f16c"}, "problem"),
        ("neon", {"asimd"}, "ok"),
        ("plain", {"avx2", "fma", "f16c"}, "note"),
        ("avx2", set(), "ok"),  # no facts: the system does not tell
    ],
)
def test_kernels_that_are_asked_for_and_do_not_run_here(
    monkeypatch: pytest.MonkeyPatch, isa: str, flags: set[str], status: str
) -> None:
    monkeypatch.setenv("ONNXCOMP_ISA", isa)
    monkeypatch.setattr(machine, "_processor", lambda: ("a processor", frozenset(flags)))
    found = environment._library(machine.look())
    assert found.status == status
    if status == "problem":
        assert repr(isa) in found.text and found.hint == "unset ONNXCOMP_ISA"


def test_probes_tell_versions_and_operators(library: Path) -> None:
    import onnxruntime

    latest_opset, latest_ir = probes.latest_opset(), probes.latest_ir_version()
    assert latest_opset is not None and latest_opset >= 21
    assert latest_ir is not None and latest_ir >= 10
    names = ("HyperMatMul", "HyperWeight", "Nonsense")
    assert probes.known_operators(names, onnxruntime.SessionOptions()) == frozenset()
    options: Any = onnxruntime.SessionOptions()
    onnxcomp.register(options)
    assert probes.known_operators(names, options) == {"HyperMatMul"}


@pytest.mark.parametrize(
    ("held", "gpus", "cuda", "status", "words"),
    [
        ((), (), None, None, ""),
        ((), ("NVIDIA H200",), "13.0", "note", "none in this library"),
        (("90",), (), None, "ok", "for compute capability 90; there is no driver"),
        (("80", "90"), ("NVIDIA H200",), "13.0", "ok", "80, 90; the driver runs CUDA 13.0"),
    ],
)
def test_cuda_kernels_and_the_driver_are_named(
    monkeypatch: pytest.MonkeyPatch,
    held: tuple[str, ...],
    gpus: tuple[str, ...],
    cuda: str | None,
    status: str | None,
    words: str,
) -> None:
    monkeypatch.setattr("onnxcomp.ops.cuda_architectures", lambda: held)
    here = dataclasses.replace(machine.look(), gpus=gpus, cuda=cuda)
    found = list(environment._cuda(here))
    assert [finding.status for finding in found] == ([status] if status else [])
    assert all(words in finding.text for finding in found)


def test_nodes_that_a_gpu_would_not_run_are_named(
    monkeypatch: pytest.MonkeyPatch, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    here = dataclasses.replace(machine.look(), gpus=("NVIDIA H200",))
    monkeypatch.setattr("onnxcomp.ops.cuda_architectures", lambda: ("90",))
    (finding,) = doctor._on_gpu(twins[1], here)
    assert (finding.status, finding.text) == ("ok", "all 2 nodes have CUDA kernels")
    model = onnx.load(twins[1])
    for node in model.graph.node:
        if node.op_type == "HyperMatMul":
            node.op_type, node.name = "WindingMatMul", "odd one"
    onnx.save(model, tmp_path / "model.onnx")
    (finding,) = doctor._on_gpu(tmp_path / "model.onnx", here)
    assert finding.text == "1 of 2 nodes run on the CPU: odd one"
    assert finding.facts == {"nodes": 2, "on_cpu": ["odd one"]}
    monkeypatch.setattr("onnxcomp.ops.cuda_architectures", lambda: ())
    (finding,) = doctor._on_gpu(twins[1], here)
    assert finding.status == "note" and len(finding.facts["on_cpu"]) == 2
    assert list(doctor._on_gpu(twins[1], dataclasses.replace(here, gpus=()))) == []


def test_the_driver_says_which_cuda_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(reference: Any) -> int:
        reference._obj.value = 13020
        return 0

    driver = SimpleNamespace(cuDriverGetVersion=answer)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: driver)
    assert machine._cuda() == "13.2"
    driver.cuDriverGetVersion = lambda _: 100
    assert machine._cuda() is None
