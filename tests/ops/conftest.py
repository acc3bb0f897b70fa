"""Tiny models of one operator each, and the numpy forms they are compared with."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import RuntimeMissingError
from onnxcomp.ops import library_path, register
from onnxcomp.passes.codecs.hyper import format as hyper_format

Array = np.ndarray[Any, Any]
DOMAIN = "com.onnxcomp"
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Weight:
    """Random codes, scales and table: any bits are a valid payload."""

    rows: int
    length: int
    bits: int
    states: int
    group: int
    codes: Array
    scales: Array
    table: Array

    @property
    def groups(self) -> int:
        return self.codes.shape[1]

    def dense(self) -> Array:
        extent = (self.rows, self.length)
        return hyper_format.decode(self.codes, self.scales, self.table, extent, self.group)

    def inputs(self) -> dict[str, Array]:
        shared = hyper_format.shared_tensors(
            self.bits, self.states, self.group, self.rows, self.length
        )
        names = hyper_format.NODE_INPUTS[2:]
        tensors = dict(zip(names, shared.values(), strict=True))
        return {"codes": self.codes, "scales": self.scales, **tensors, "table": self.table}

    def attributes(self, op: str) -> dict[str, Any]:
        result: dict[str, Any] = {"extent": [self.rows, self.length], "group": self.group}
        if op == "HyperGather":
            result["columns"] = [self.length]
        return result


def random_weight(
    rows: int,
    length: int,
    *,
    bits: int = 4,
    states: int = 7,
    group: int = 128,
    seed: int = 0,
    odd: bool = False,
    leveled: bool = False,
    structured: str = "",
) -> Weight:
    """Random payload; `odd` and `leveled` make the table so, as the encoder's tables are.

    With `structured` it is structured: "falling", "sloped", "twisted" or "turned".
    """
    rng = np.random.default_rng([seed, rows, length, bits, states, group])
    geometry = hyper_format.GroupLayout(bits, states, group, rows, length)
    table = rng.integers(-127, 128, 1 << states).astype(np.int8)
    if leveled:
        multiplier = 2 * int(rng.integers(1 << (states - 1))) + 1
        places = multiplier * np.arange(1 << states) + (multiplier - 1) // 2
        values = np.concatenate([-table[:128], table[127::-1]])
        table = values[(places % (1 << states)) >> (states - 8)]
    if structured:
        table = structured_table(rng, states, structured)
    if odd:
        table[table.size // 2 :] = -table[: table.size // 2][::-1]
    return Weight(
        rows,
        length,
        bits,
        states,
        group,
        rng.integers(0, 256, geometry.codes_shape, np.uint8),
        rng.normal(0.0, 0.5, geometry.scales_shape).astype(np.float16),
        table,
    )


def structured_table(rng: np.random.Generator, states: int, kind: str) -> Array:
    """A random table of spec.md section 3 with all that a kind leaves free."""
    limit, shift = (31, 2) if rng.random() < 0.5 else (63, 1)
    turns = rng.integers(0, 16, 16) if kind in ("twisted", "turned") else np.arange(16)
    steps = rng.integers(0, 16, 16) if kind in ("sloped", "turned") else 15 - turns
    cells = rng.permutation([0, limit - 15, *rng.integers(0, limit - 14, 14)])
    state = np.arange(1 << states)
    low = state & 15
    sums = cells[((state >> (states - 4)) + turns[low]) & 15] + steps[low]
    return np.asarray((sums << shift) - (limit << shift) // 2, np.int8)


def make_model(
    op: str,
    weight: Weight,
    x: tuple[int, Sequence[int | str | None] | None] | None,
    *,
    attributes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    cast: int | None = None,
    fed: Sequence[str] = (),
) -> onnx.ModelProto:
    """One node with its weight as initializers.

    Args:
        op: Operator name.
        weight: What the node multiplies by, looks up or decodes.
        x: Element type and shape of the graph's input; None for HyperDecode.
        attributes: Replaces attributes by name; a value of None drops one.
        tensors: Replaces initializers by name.
        cast: Element type between casts around the node; the graph then speaks x's type.
        fed: Initializers that become graph inputs instead.
    """
    values = {**weight.inputs(), **(tensors or {})}
    given = {**weight.attributes(op), **(attributes or {})}
    dtype = cast or (x[0] if x else TensorProto.FLOAT)
    if op == "HyperMatMul":
        given.setdefault("dtype", dtype)
    nodes, inputs, first, last = [], [], [], "y"
    if x is not None:
        inputs.append(helper.make_tensor_value_info("x", *x))
        first.append("x")
    if cast is not None and x is not None:
        nodes.append(helper.make_node("Cast", ["x"], ["xc"], to=cast))
        first, last = ["xc"], "yc"
    kept = {name: value for name, value in given.items() if value is not None}
    names = [*first, *hyper_format.NODE_INPUTS]
    nodes.append(helper.make_node(op, names, [last], name="node", domain=DOMAIN, **kept))
    if cast is not None and x is not None:
        nodes.append(helper.make_node("Cast", ["yc"], ["y"], to=x[0]))
    for name in fed:
        array = values.pop(name)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
    out = x[0] if x is not None and op == "HyperMatMul" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [helper.make_tensor_value_info("y", out, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.fixture(scope="session")
def library() -> Path:
    try:
        return library_path()
    except RuntimeMissingError as error:
        pytest.skip(f"the operator library is not built: {error}")


@pytest.fixture(scope="session")
def open_session(library: Path) -> Callable[..., Any]:
    """Opens a session on a model or a path, with the operator library."""
    import onnxruntime

    def open_(model: onnx.ModelProto | Path, threads: int = 1) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        register(options)
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return open_


@pytest.fixture(scope="session")
def isas(library: Path) -> list[str]:
    """Names of the instruction sets that this machine can run, plain C++ first."""
    import onnxruntime

    names = []
    model = make_model("HyperDecode", random_weight(1, 32, group=32), None).SerializeToString()
    for name in ("plain", "avx2", "avx2vnni", "avx512", "neon"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        register(options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ONNXCOMP_ISA", name)
            try:
                onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            except Exception as error:
                assert "ONNXCOMP_ISA" in str(error)
                continue
        names.append(name)
    return names


@pytest.fixture
def run_on_all(
    open_session: Callable[..., Any], isas: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs a one-output model on every instruction set: (name, one result for each feed)."""

    def run(model: onnx.ModelProto, feeds: Sequence[dict[str, Array]]) -> Any:
        for name in isas:
            monkeypatch.setenv("ONNXCOMP_ISA", name)
            session = open_session(model)
            yield name, [session.run(None, one)[0] for one in feeds]
        monkeypatch.delenv("ONNXCOMP_ISA")

    return run


def rotate(x: Array, group: int) -> Array:
    """H (sign * x) per group in float32, butterflies at strides 1, 2, 4, ...: (m, G, group)."""
    m, length = x.shape
    groups = -(-length // group)
    padded = np.zeros((m, groups * group), np.float32)
    padded[:, :length] = x
    z = padded.reshape(m, groups, group) * hyper_format.signs(group)
    stride = 1
    while stride < group:
        pair = z.reshape(m, groups, group // (2 * stride), 2, stride)
        low, high = pair[..., 0, :], pair[..., 1, :]
        z = np.stack([low + high, low - high], axis=-2).reshape(z.shape)
        stride *= 2
    return z


def product_int8(x: Array, weight: Weight) -> Array:
    """HyperMatMul with precision 1 as spec.md section 4 defines it, bit by bit."""
    z = rotate(x, weight.group)
    largest = np.abs(z).max(axis=-1, keepdims=True)
    empty = largest < np.float32(2.0**-100)
    safe = np.where(empty, np.float32(1), largest)
    codes = np.where(empty, np.float32(0), np.rint(z * (np.float32(127) / safe)))
    scale = np.where(empty, np.float32(0), safe / np.float32(127))[..., 0]
    states = hyper_format.states(weight.codes, weight.states, weight.group)
    q = weight.table.astype(np.float64)[states]
    lanes = weight.scales.reshape(weight.codes.shape[0], weight.groups, 16)
    factor = lanes.transpose(0, 2, 1).reshape(-1, weight.groups).astype(np.float32)
    factor = factor * np.float32(2.0**-12)
    y = np.zeros((x.shape[0], q.shape[0]), np.float32)
    for g in range(weight.groups):
        sums = (codes[:, g].astype(np.float64) @ q[:, g].T).astype(np.float32)
        y = y + sums * (factor[None, :, g] * scale[:, g, None])
    return y[:, : weight.rows]


def exact_bound(x: Array, weight: Weight) -> Array:
    """Largest error of float32 sums: terms x eps x |x| |w| (the rotation keeps norms)."""
    terms = weight.group + weight.groups + 16
    norms = np.linalg.norm(x.astype(np.float64), axis=-1)[..., None]
    rows = np.linalg.norm(weight.dense().astype(np.float64), axis=-1)
    return terms * np.finfo(np.float32).eps * norms * rows + 1e-30


# What an operator library for the emulated GPU is made of.
EMULATED = (
    "registry.cc",
    "common/keep_loaded.cc",
    "gpu/call.cu",
    "gpu/emulator.cc",
    *(f"hash/{name}" for name in ("cuda.cu", "gpu_ops.cc", "weight.cc")),
    *(f"hyper/{name}.cu" for name in ("cuda", "decode", "few_rows", "hopper")),
    *(f"hyper/{name}.cc" for name in ("gpu_ops", "levels", "structure", "weight")),
    "winding/cpu.cc",
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An operator library whose GPU is this CPU: the CUDA kernels and the operators around them."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    prebuilt = os.environ.get("ONNXCOMP_EMULATED_LIBRARY")
    if prebuilt is not None:  # for work on kernels: compiled before
        return Path(prebuilt)
    library = tmp_path_factory.mktemp("cuda") / "emulated.so"
    ops = ROOT / "ops"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{ops}"]
    flags += ["-fsanitize=bounds", "-fsanitize-undefined-trap-on-error", "-Wl,-z,nodelete"]
    flags += ["-DONNXCOMP_CUDA", "-DONNXCOMP_CUDA_EMULATED"]
    sources = [str(ops / name) for name in EMULATED]
    command = [compiler, "-x", "c++", *flags, "-o", str(library), *sources]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return library


@pytest.fixture(scope="session")
def benchmarks() -> Any:
    """What benchmarks/ has to make weights for CUDA kernels and to call these."""
    import importlib
    import types

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names: dict[str, Any] = {}
        for module in ("gpu_calls", "gpu_memory", "gpu_weights", "gpu_compare"):
            names |= vars(importlib.import_module(module))
        for module in (
            "gpu_check",
            "gpu_decoder",
            "gpu_models",
            "gpu_sessions",
            "gpu_timing",
            "results",
        ):
            names[module] = importlib.import_module(module)
    return types.SimpleNamespace(**names)


@pytest.fixture(scope="session")
def hyper() -> Any:
    """The functions of this file, for test modules (which cannot import each other)."""
    import types

    return types.SimpleNamespace(
        random_weight=random_weight,
        make_model=make_model,
        product_int8=product_int8,
        exact_bound=exact_bound,
        rotate=rotate,
    )
