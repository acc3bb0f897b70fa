"""Kernels, portable bodies and numpy mean the same shared weight, on every instruction set."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.codecs.hash import bodies as hash_bodies
from onnxcomp.passes.codecs.hash import format as hash_format
from onnxcomp.passes.codecs.hash.format import ChunkLayout, Sharing
from onnxcomp.passes.weight import DOMAIN
from onnxcomp.runtime.machine import can_run

Array = npt.NDArray[Any]

ISAS = ("plain", "avx2", "avx512")
OPSETS = (7, 8, 9, 10, 11, 13, 17, 18, 21, 23)
MEMORIES = (np.float32, np.float16, np.int8)
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


@dataclasses.dataclass(frozen=True)
class Case:
    """A random memory and map: any bits are a valid weight."""

    geometry: ChunkLayout
    sharing: Sharing
    memory: Array
    scale: Array
    codes: Array

    @property
    def chosen(self) -> Array | None:
        return self.codes if self.sharing.stride else None

    def dense(self) -> Array:
        return hash_format.expand(self.memory, self.scale, self.geometry, self.sharing, self.chosen)

    def inputs(self) -> dict[str, Array]:
        shared = hash_format.shared_tensors(self.geometry, self.sharing)
        named = {key.split(".")[1]: array for key, array in shared.items()}
        return named | {"memory": self.memory, "scale": self.scale, "codes": self.codes}


def make_case(
    rows: int,
    length: int,
    *,
    chunk: int = 256,
    slots: int = 3,
    run: int | None = None,
    base: int = 0,
    stride: int = 0,
    signed: bool = True,
    memory: type = np.float32,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng([rows, length, chunk, slots, seed])
    geometry = ChunkLayout(rows, length, chunk)
    rotate, sign = hash_format.seeds(seed)
    sharing = Sharing(run or slots, rotate, sign if signed else None, base, stride)
    values = (
        rng.integers(-127, 128, (slots, chunk)).astype(np.int8)
        if memory is np.int8
        else rng.standard_normal((slots, chunk)).astype(memory)
    )
    shape = (geometry.panels, geometry.blocks, geometry.parts)
    codes = rng.integers(0, 256, shape) if stride else np.zeros((1, 1, 1))
    return Case(geometry, sharing, values, np.array([0.37], np.float32), codes.astype(np.uint8))


def model_of(
    op: str,
    inputs: dict[str, Array],
    extent: tuple[int, int],
    x: Array | None,
    *,
    precision: int = 0,
    opset: int = 17,
) -> onnx.ModelProto:
    attributes: dict[str, Any] = {"extent": list(extent)}
    feeds, names, dtype = [], list(hash_format.NODE_INPUTS), TensorProto.FLOAT
    if x is not None:
        element = helper.np_dtype_to_tensor_dtype(x.dtype)
        feeds = [helper.make_tensor_value_info("x", element, x.shape)]
        names = ["x", *names]
        dtype = element if op == "HashMatMul" else dtype
    if op == "HashMatMul":
        attributes |= {"dtype": dtype, "precision": precision}
    node = helper.make_node(op, names, ["y"], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        *([node], "g", feeds, [helper.make_tensor_value_info("y", dtype, None)]),
        [numpy_helper.from_array(inputs[name], name) for name in hash_format.NODE_INPUTS],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    bodies = list(hash_bodies.functions(opset))
    return helper.make_model(graph, opset_imports=imports, functions=bodies, ir_version=8)


def run(model: onnx.ModelProto, x: Array | None, *, library: bool) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        onnxcomp.register(options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {} if x is None else {"x": x})[0])


def forms_of(
    op: str, case: Case, x: Array | None, *, opset: int = 17, precision: int = 0
) -> tuple[Array, Array]:
    """What the kernel and the body give."""
    extent = (case.geometry.rows, case.geometry.length)
    model = model_of(op, case.inputs(), extent, x, precision=precision, opset=opset)
    return run(model, x, library=True), run(model, x, library=False)


CASES = st.builds(
    make_case,
    st.integers(1, 70),
    st.integers(1, 300),
    chunk=st.sampled_from(hash_format.CHUNKS),
    slots=st.integers(1, 40),
    run=st.one_of(st.none(), st.integers(1, 50)),
    base=st.integers(0, 1000),
    stride=st.sampled_from([0, 0, 7]),
    signed=st.booleans(),
    memory=st.sampled_from(MEMORIES),
    seed=st.integers(0, 5),
)


@settings(max_examples=40, deadline=None)
@given(case=CASES)
def test_kernels_bodies_and_numpy_expand_to_the_same_bits(case: Case) -> None:
    dense = case.dense()
    kernel, body = forms_of("HashDecode", case, None)
    assert np.array_equal(kernel, dense)
    assert np.array_equal(body, dense)
    rows = case.geometry.rows
    indices = np.array([[0, -1], [rows - 1, -rows]], np.int64)
    for form in forms_of("HashGather", case, indices):
        assert np.array_equal(form, dense[indices])


@pytest.mark.parametrize("opset", OPSETS)
def test_bodies_are_right_in_every_opset(opset: int) -> None:
    for case in (
        make_case(33, 40, base=70_000),
        make_case(20, 50, chunk=8, slots=100, stride=37, signed=False),
        make_case(18, 35, run=1, slots=4, memory=np.int8),
    ):
        dense = case.dense()
        x = np.random.default_rng(1).standard_normal((3, dense.shape[1])).astype(np.float32)
        _, product = forms_of("HashMatMul", case, x, opset=opset)
        np.testing.assert_allclose(product, x @ dense.T, rtol=0, atol=1e-4)
        _, weight = forms_of("HashDecode", case, None, opset=opset)
        assert np.array_equal(weight, dense)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 13, 146, 150])
def test_products_are_those_of_the_dense_weight(
    isa: str, memory: type, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_run(isa):
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("ONNXCOMP_ISA", isa)
    for case in (
        make_case(50, 300, slots=9, memory=memory, base=3),
        make_case(33, 150, chunk=8, slots=60, stride=7, memory=memory),
    ):
        dense = case.dense().astype(np.float64)
        x = np.random.default_rng(count).standard_normal((count, dense.shape[1]))
        x = x.astype(np.float32)
        kernel, _ = forms_of("HashMatMul", case, x)
        expected = x @ dense.T
        bound = 1e-5 * (np.abs(x) @ np.abs(dense).T)
        assert (np.abs(kernel - expected) <= bound).all()


def int8_product(case: Case, x: Array) -> Array:
    """Spec section 4, precision 1."""
    unit = dataclasses.replace(case, scale=np.ones(1, np.float32)).dense()
    groups = -(-x.shape[1] // 128)
    padded = np.zeros((len(x), groups * 128), np.float32)
    padded[:, : x.shape[1]] = x
    weight = np.zeros((len(unit), groups * 128), np.float32)
    weight[:, : x.shape[1]] = unit
    y = np.zeros((len(x), len(unit)), np.float32)
    for group in range(groups):
        part = padded[:, group * 128 : group * 128 + 128]
        most = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), most, where=most > 0, out=np.zeros_like(most))
        codes = np.rint(part * inverse)
        y += (codes @ weight[:, group * 128 : group * 128 + 128].T) * (most / np.float32(127))
    return y * case.scale


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12, 29, 146])
def test_int8_products_have_the_same_bits_on_every_instruction_set(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(50, 300, slots=9, memory=np.int8, base=3)
    x = np.random.default_rng(count).standard_normal((count, 300)).astype(np.float32)
    x[0, 128:256] = 0
    expected = int8_product(case, x)
    for isa in filter(can_run, ISAS):
        monkeypatch.setenv("ONNXCOMP_ISA", isa)
        kernel, _ = forms_of("HashMatMul", case, x, precision=1)
        assert np.array_equal(kernel, expected), isa


def test_half_precision_activations_are_products_in_float32() -> None:
    case = make_case(40, 70, memory=np.float16)
    x = np.random.default_rng(0).standard_normal((2, 70)).astype(np.float16)
    expected = x.astype(np.float32) @ case.dense().T
    for form in forms_of("HashMatMul", case, x):
        assert form.dtype == np.float16
        np.testing.assert_allclose(form.astype(np.float32), expected, rtol=2e-3, atol=2e-3)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("memory", {"shape": (3, 100)}, "power of two"),
    ("memory", {"shape": (0, 256)}, "slots"),
    ("memory", {"shape": (3, 16, 16)}, "slots"),
    ("scale", {"values": [np.inf]}, "scale"),
    ("scale", {"values": [1, 2]}, "scale"),
    ("codes", {"shape": (2, 2, 1)}, "codes"),
    ("codes", {"shape": (0, 1, 1)}, "codes"),
    ("map", {"values": [0, 0, 0, 0, 0, 1]}, r"map\[1\]"),
    ("map", {"values": [-1, 3, 0, 0, 0, 1]}, r"map\[0\]"),
    ("map", {"values": [0, 3, 0, 2**31, 0, 1]}, r"map\[3\]"),
    ("map", {"values": [0, 3, 0, 0, 0, 2]}, r"map\[5\]"),
    ("map", {"values": [0, 3, 0, 0]}, "map"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
@pytest.mark.parametrize("op", ["HashMatMul", "HashGather", "HashDecode"])
def test_corrupted_weights_are_errors(
    op: str, name: str, change: dict[str, Any], message: str
) -> None:
    case = make_case(33, 40)
    inputs = case.inputs()
    old = inputs[name]
    values = np.zeros(change["shape"]) if "shape" in change else np.array(change["values"])
    inputs[name] = values.astype(old.dtype)
    x = {
        "HashMatMul": np.ones((2, 40), np.float32),
        "HashGather": np.array([1], np.int64),
        "HashDecode": None,
    }[op]
    with pytest.raises(Exception, match=message):
        run(model_of(op, inputs, (33, 40), x), x, library=True)


def test_an_index_outside_the_table_is_an_error() -> None:
    case = make_case(33, 40)
    for index in (33, -34):
        x = np.array([index], np.int64)
        with pytest.raises(Exception, match="outside"):
            run(model_of("HashGather", case.inputs(), (33, 40), x), x, library=True)


OTHER_RUNTIME = """
import pathlib, sys
import numpy as np, onnxruntime as ort
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.save(path.with_suffix(".npy"), session.run(None, {})[0])
print(ort.__version__)
"""


def test_bodies_run_in_other_releases_of_the_runtime(tmp_path: Path) -> None:
    pythons = [p for p in os.environ.get("ONNXCOMP_ORT_PYTHONS", "").split(":") if p]
    if not pythons:
        pytest.skip("no other ONNX Runtime: set ONNXCOMP_ORT_PYTHONS")
    case = make_case(33, 40, base=7)
    for opset in (9, 17):
        model = model_of("HashDecode", case.inputs(), (33, 40), None, opset=opset)
        onnx.save(model, tmp_path / f"opset{opset}.onnx")
    for python in pythons:
        command = [python, "-c", OTHER_RUNTIME, str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True)
        for path in tmp_path.glob("*.npy"):
            assert np.array_equal(np.load(path), case.dense())
            path.unlink()
