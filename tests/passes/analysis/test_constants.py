"""Constants are recognised and kept bit for bit; trained weights are not taken for constants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp as oc
from onnxcomp.passes.analysis.constants import mark_constants
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import Array

RNG = np.random.default_rng(0)


def one_node(
    op_type: str, tensor: Array, *, second: bool = False, opset: int = 17
) -> onnx.ModelProto:
    """A node that reads one tensor and an input of a matching shape."""
    shape = list(tensor.shape)
    if op_type == "MatMul":
        shape = [3, tensor.shape[0]]
    if op_type == "Conv":
        shape = [1, len(tensor), *(2 * size for size in tensor.shape[2:])]
    names = ["c", "x"] if second else ["x", "c"]
    if op_type == "Cos":
        names = ["c"]
    kind = (
        TensorProto.INT64 if op_type == "Gather" else helper.np_dtype_to_tensor_dtype(tensor.dtype)
    )
    if op_type == "Gather":
        names, shape = ["c", "x"], [5]
    options = {"group": len(tensor)} if op_type == "Conv" else {}
    tail = [helper.make_node(op_type, names, ["y" if op_type != "Gather" else "g"], **options)]
    if op_type == "Gather":
        tail.append(helper.make_node("Add", ["g", "bias"], ["y"]))
    inits = [numpy_helper.from_array(tensor, "c")]
    if op_type == "Gather":
        inits.append(numpy_helper.from_array(np.ones(1, tensor.dtype), "bias"))
    out = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    graph = helper.make_graph(
        tail,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", out, None)],
        inits,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def marked(op_type: str, tensor: Array) -> str:
    """The reason of the tensor; empty where it is a weight."""
    model = load(one_node(op_type, tensor))
    canonicalize(model)
    (site,) = mark_constants(model, find_sites(model, min_size=64).sites)
    return "" if site.constant is None else site.constant.reason


def grid(*sides: int) -> Array:
    points = [
        np.stack([np.tile(np.arange(n) + 0.5, n), np.repeat(np.arange(n) + 0.5, n)]) for n in sides
    ]
    return np.concatenate(points, axis=1)[None].astype(np.float32)


def sinusoids(positions: int, width: int) -> Array:
    angles = np.arange(positions)[:, None] / 10000 ** (np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def fourier(size: int, *, length: int | None = None) -> Array:
    window = np.hanning(length or size)
    window = np.pad(window, (0, size - len(window)))
    n, k = np.arange(size), np.arange(size // 2 + 1)[:, None]
    angles = 2 * np.pi * k * n / size
    return (np.concatenate([np.cos(angles), -np.sin(angles)]) * window).astype(np.float32)


def mel(bands: int, bins: int) -> Array:
    edges = np.linspace(0, bins**0.5, bands + 2) ** 2
    x = np.arange(bins)
    rows = [
        np.clip(np.minimum((x - a) / (b - a), (c - x) / (c - b)), 0, None)
        for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)
    ]
    return np.array(rows, np.float32)


def anchors(*strides: int) -> Array:
    """Corners of boxes of nine sizes at every place of an image of 160 x 160 pixels."""
    sizes = [(s * a**-0.5, s * a**0.5) for s in (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
             for a in (0.5, 1, 2)]  # fmt: skip
    found = []
    for stride in strides:
        places = (np.arange(160 // stride) + 0.5) * stride
        centres = np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 1, 2)
        half = np.array(sizes)[None] * stride / 2
        found.append(np.concatenate([centres - half, centres + half], axis=2).reshape(-1, 4))
    return np.concatenate(found)[None].astype(np.float32)


def wavelets(count: int, length: int) -> Array:
    """Sines under windows that become shorter as the frequency rises."""
    lines = []
    for number in range(count):
        own = int(length * 2 ** (-number / 24))
        frequency = 0.06 * 2 ** (number / 24)
        window = np.hanning(own) * np.cos(2 * np.pi * frequency * np.arange(own))
        lines.append(np.pad(window, (0, length - own)))
    return np.array(lines)[:, None].astype(np.float32)


def hadamard(size: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)


def rotation(size: int) -> Array:
    return np.linalg.qr(RNG.standard_normal((size, size)))[0].astype(np.float32)


def blur(channels: int, size: int) -> Array:
    line = np.exp(-np.square(np.arange(size) - size // 2) / size)
    return np.tile(np.outer(line, line).astype(np.float32), (channels, 1, 1, 1))


def slopes(heads: int, size: int) -> Array:
    distance = np.abs(np.arange(size)[:, None] - np.arange(size))
    return (-(2.0 ** -np.arange(1, heads + 1))[:, None, None] * distance).astype(np.float32)


CONSTANTS = {
    "anchor grid": ("Sub", grid(80, 40, 20)),
    "strides": ("Mul", np.repeat(np.float32([8, 16, 32]), 400).reshape(2, 600)),
    "causal mask": ("Add", np.triu(np.full((96, 96), -1e4, np.float32), 1)[None, None]),
    "mask of the largest": ("Add", np.triu(np.full((64, 64), np.finfo(np.float32).min), 1)),
    "linear bias": ("Add", np.float32([0.5, 0.25])[:, None, None] * np.arange(64, dtype=np.float32)
                    * np.ones((1, 32, 1), np.float32)),
    "positions": ("Add", sinusoids(100, 64)[None]),
    "rotary table": ("Mul", sinusoids(512, 32)),
    "pixel coordinates": ("Add", np.indices((30, 40)).astype(np.float32)),
    "looked-up positions": ("Gather", sinusoids(200, 32)),
    "looked-up integers": ("Gather", RNG.permutation(2000).reshape(100, 20).astype(np.float32)),
    "identity": ("MatMul", np.eye(64, dtype=np.float32)),
    "permutation": ("MatMul", np.eye(96, dtype=np.float32)[RNG.permutation(96)]),
    "one-hot": ("MatMul", np.repeat(np.eye(16, dtype=np.float32), 8, axis=0)),
    "windowed transform": ("MatMul", fourier(256).T.copy()),
    "transform with a short window": ("MatMul", fourier(512, length=400).T.copy()),
    "cosine transform": ("MatMul", np.cos(np.pi / 64 * (np.arange(64) + 0.5)[:, None]
                                          * np.arange(64)).astype(np.float32)),
    "mel bands": ("MatMul", mel(40, 201).T.copy()),
    "averages": ("MatMul", np.full((64, 32), 1 / 64, np.float32)),
    "anchor boxes": ("Add", anchors(8, 16)),
    "distances times slopes": ("Add", slopes(8, 96)),
    "one-hot rows": ("Gather", np.eye(96, dtype=np.float32)),
    "Hadamard": ("MatMul", hadamard(64)),
    "rotation": ("MatMul", rotation(96)),
    "wavelets": ("Conv", wavelets(48, 256)),
    "one filter for all channels": ("Conv", blur(16, 9)),
    "angles": ("Cos", sinusoids(64, 48)),
}  # fmt: skip


def ramp(count: int) -> Array:
    return np.arange(count, dtype=np.float32)


def trained(*shape: int) -> Array:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def smooth_positions(count: int, width: int) -> Array:
    """Learned positions are smooth along the sequence, up to some per cent of noise."""
    walk = np.cumsum(RNG.standard_normal((count, width)), axis=0) / count**0.5
    return (walk + 0.03 * RNG.standard_normal((count, width))).astype(np.float32)


def smooth_filters(count: int, length: int) -> Array:
    """Noise of low frequencies under a window, as trained filters of sound are."""
    lines = [np.convolve(line, np.hanning(33), "valid") for line in trained(count, length + 32)]
    return (np.array(lines) * np.hanning(length)).astype(np.float32)[:, None]


WEIGHTS = {
    "a matrix": ("MatMul", trained(96, 64)),
    "learned positions": ("Add", trained(1, 128, 64)),
    "smooth positions": ("Add", smooth_positions(256, 64)),
    "embeddings": ("Gather", trained(300, 48)),
    "bfloat16 positions": ("Add", (trained(64, 768).view(np.uint32) & 0xFFFF0000).view(np.float32)),
    "half precision": ("MatMul", trained(80, 80).astype(np.float16).astype(np.float32)),
    "ternary": ("MatMul", RNG.integers(-1, 2, (96, 64)).astype(np.float32) * 0.02),
    "binary": ("MatMul", np.where(RNG.random((96, 64)) < 0.5, -1, 1).astype(np.float32)),
    "eight bits": ("MatMul", np.rint(127 * np.tanh(trained(96, 64) * 3)) / np.float32(300)),
    "pruned": ("MatMul", trained(96, 64) * (RNG.random((96, 64)) < 0.05)),
    "integers of eight bits": ("MatMul", np.rint(trained(64, 64) * 300)),
    "half precision positions": ("Add", trained(512, 256).astype(np.float16).astype(np.float32)),
    "orthonormal rows": ("MatMul", rotation(128)[:48]),
    "nearly a rotation": ("MatMul", rotation(64) + trained(64, 64) * np.float32(1e-2)),
    "smooth filters": ("Conv", smooth_filters(64, 128)),
    "filters of sound": ("Conv", trained(64, 1, 256)),
    "embeddings of eight bits": ("Gather", np.rint(trained(300, 48) * 200) / np.float32(90)),
}


@pytest.mark.parametrize("case", CONSTANTS.values(), ids=CONSTANTS)
def test_constants_are_recognised(case: tuple[str, Array]) -> None:
    assert marked(*case).startswith("constant: ")


@pytest.mark.parametrize("case", WEIGHTS.values(), ids=WEIGHTS)
def test_trained_weights_are_not(case: tuple[str, Array]) -> None:
    assert marked(case[0], np.asarray(case[1], np.float32)) == ""


FORMS: dict[str, tuple[str, Callable[[], Array]]] = {
    "two values": ("Add", lambda: np.triu(np.full((130, 127), -1e4, np.float32), 1)),
    "zeros of both signs": ("Add", lambda: np.where(np.eye(128) > 0, -0.0, 0.0).astype(np.float32)),
    "six values": ("Mul", lambda: (np.arange(20001) % 6).astype(np.float32).reshape(3, 6667)),
    "several pieces": ("Mul", lambda: RNG.integers(0, 3, (1100, 701)).astype(np.float32)),
    "many values": ("Sub", lambda: grid(64, 32)),
    "a range": ("Mul", lambda: ramp(9000).reshape(90, 100) * np.float32(0.1)),
    "half precision": ("Add", lambda: np.float32([0.5, 1])[:, None] * ramp(2048)),
    "float16": ("Add", lambda: np.triu(np.full((256, 256), -6e4, np.float16), 1)),
}  # fmt: skip


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("case", FORMS.values(), ids=FORMS)
def test_every_bit_is_kept_and_the_plan_is_exact(
    case: tuple[str, Callable[[], Array]], opset: int, tmp_path: Path
) -> None:
    op_type, make = case
    tensor = make()
    if opset < 11 and case is FORMS["a range"]:
        pytest.skip("the operator Range is of set 11")
    model = tmp_path / "m.onnx"
    onnx.save(one_node(op_type, tensor, opset=opset), model)
    result = oc.optimize(model, tmp_path / "o.onnx", min_size=64, bits=2, external_data="never")
    (site,) = result.report.sites
    assert site.method == "constant", site.reason
    assert site.bytes_after < site.bytes_before
    assert site.weight_error == 0.0
    assert result.report.coverage == 1.0
    assert result.plan.bytes is not None
    assert abs(result.plan.bytes - result.report.output.bytes) <= 16
    assert onnx.load(tmp_path / "o.onnx").opset_import[0].version == opset
    x = RNG.standard_normal(tensor.shape).astype(tensor.dtype)
    for path in ("o", "e"):
        for level in (
            onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        ):
            if path == "e" and not (tmp_path / "e.onnx").exists():
                oc.expand(tmp_path / "o.onnx", tmp_path / "e.onnx")
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = level
            sessions = [
                onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
                for file in (model, tmp_path / f"{path}.onnx")
            ]
            (wanted,), (found,) = (session.run(None, {"x": x}) for session in sessions)
            assert wanted.tobytes() == found.tobytes()
    expanded = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "e.onnx").graph.initializer
    }
    assert expanded["c"].tobytes() == tensor.tobytes()


def test_a_rule_wins(tmp_path: Path) -> None:
    onnx.save(one_node("Sub", grid(80, 40, 20)), tmp_path / "m.onnx")
    result = oc.optimize(
        tmp_path / "m.onnx", tmp_path / "o.onnx", set_="c:method=hyper", verify=False
    )
    (site,) = result.report.sites
    assert site.method == "hyper"


def test_constants_that_stay_as_they_are_count_as_covered(tmp_path: Path) -> None:
    table = sinusoids(512, 64)
    model = one_node("Mul", table)
    onnx.save(model, tmp_path / "m.onnx")
    result = oc.optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", bits=4)
    (site,) = result.report.sites
    assert (site.method, site.bytes_after) == ("dense", table.nbytes)
    assert site.reason.startswith("constant: sequences that follow a rule, read by Mul")
    assert result.report.coverage == 1.0


@pytest.mark.parametrize(("scale", "method"), [(1.0, "constant"), (1 / 3, "dense")])
def test_float64_constants_keep_their_bits(scale: float, method: str, tmp_path: Path) -> None:
    """Where float32 holds them, they are stored by it; else they stay."""
    tensor = grid(80, 40).astype(np.float64) * scale
    onnx.save(one_node("Sub", tensor), tmp_path / "m.onnx")
    result = oc.optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", bits=2)
    assert [site.method for site in result.report.sites] == [method]
    x = RNG.standard_normal(tensor.shape)
    wanted, found = (
        onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(
            None, {"x": x}
        )[0]
        for name in ("m.onnx", "o.onnx")
    )
    assert wanted.tobytes() == found.tobytes()


def test_nothing_is_stored_otherwise_where_all_is_to_stay_dense(tmp_path: Path) -> None:
    onnx.save(one_node("Sub", grid(80, 40, 20)), tmp_path / "m.onnx")
    result = oc.optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", method="dense")
    assert [site.method for site in result.report.sites] == ["dense"]


def branch(mask: Array, *, out: str) -> onnx.ModelProto:
    """A branch that returns a mask, which is added outside of it or is an output of the model."""
    value = helper.make_tensor_value_info
    yes = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["a"])], "yes", [],
        [value("a", TensorProto.FLOAT, mask.shape)], [numpy_helper.from_array(mask, "c")],
    )  # fmt: skip
    no = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "no", [],
        [value("b", TensorProto.FLOAT, mask.shape)],
    )  # fmt: skip
    nodes = [
        helper.make_node("If", ["go"], ["m"], then_branch=yes, else_branch=no),
        helper.make_node("Add", ["m", "x"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [value("go", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, mask.shape)],
        [value(out, TensorProto.FLOAT, None)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("out", ["y", "m"])
@pytest.mark.parametrize("is_mask", [True, False])
def test_what_a_branch_returns_is_followed(is_mask: bool, out: str) -> None:
    tensor = np.triu(np.full((96, 96), -1e4, np.float32), 1) if is_mask else trained(96, 96)
    model = load(branch(tensor, out=out))
    canonicalize(model)
    (site,) = mark_constants(model, find_sites(model, min_size=64).sites)
    assert (site.constant is not None) == is_mask


@pytest.mark.parametrize("op_type", ["GridSample", "ScatterElements"])
def test_operands_of_other_operators_are_told_by_their_input(op_type: str) -> None:
    places = np.stack(np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48)), axis=-1)
    names = {"GridSample": ["x", "c"], "ScatterElements": ["c", "i", "x"]}[op_type]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op_type, names, ["y"])], "g",
        [value("x", TensorProto.FLOAT, None), value("i", TensorProto.INT64, None)],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(places[None].astype(np.float32), "c")],
    )  # fmt: skip
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    canonicalize(model)
    (site,) = mark_constants(model, find_sites(model, min_size=64).sites)
    assert site.constant is not None and op_type in site.constant.reason
