"""Logits of the last positions only: what is computed, what is refused, what bytes it takes."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp as oc
from onnxcomp.errors import UsageError
from onnxcomp.passes.lowering.last_logits import keep_last_logits
from onnxcomp.runtime.evaluate import run_session
from onnxcomp.runtime.language.decoder import Decoder

TOKENS = np.array([[5, 77, 30, 12, 200, 9, 41], [1, 2, 3, 4, 5, 6, 7]])


def logits(path: Path, *, library: bool | None = None) -> np.ndarray:
    from onnxcomp.runtime.session import open_session

    return Decoder(open_session(path, library=library)).logits(TOKENS)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_the_last_positions_are_those_of_the_whole(
    decoder_folder: Path, tmp_path: Path, count: int
) -> None:
    path = tmp_path / "last.onnx"
    result = oc.optimize(decoder_folder / "model.onnx", path, bits=4, logits_to_keep=count)
    assert result.verify is not None and result.verify.passed
    # Bytes were known before, and the gates saw the logits of all positions.
    assert result.report.output.bytes == path.stat().st_size == result.plan.bytes
    for library in (None, False):
        whole = logits(decoder_folder / "small.onnx", library=library)
        found = logits(path, library=library)
        assert found.shape == (2, min(count, 7), 320)
        np.testing.assert_allclose(found, whole[:, -count:], atol=1e-3)
    (output,) = (v for v in onnx.load(path).graph.output if v.name == "logits")
    dims = [dim.dim_value or dim.dim_param for dim in output.type.tensor_type.shape.dim]
    assert dims[0] == "batch" and dims[2] == 320 and (dims[1] == 1) == (count == 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.onnx"]


def test_fewer_rows_reach_the_head(decoder_folder: Path, tmp_path: Path) -> None:
    oc.optimize(decoder_folder / "model.onnx", tmp_path / "a.onnx", bits=4, logits_to_keep=1)
    graph = onnx.load(tmp_path / "a.onnx").graph
    (head,) = (node for node in graph.node if "logits" in node.output)
    assert head.op_type == "HyperMatMul"
    (cut,) = (node for node in graph.node if head.input[0] in node.output)
    assert cut.op_type == "Slice"
    # The table is there once: the look-up reads the codes that the head multiplies with.
    (look_up,) = (node for node in graph.node if node.op_type == "HyperGather")
    assert look_up.input[1:3] == head.input[1:3]


def test_what_was_compressed_before_keeps_its_codes(decoder_folder: Path, tmp_path: Path) -> None:
    small, path = decoder_folder / "small.onnx", tmp_path / "last.onnx"
    oc.optimize(small, path, method="dense", logits_to_keep=1)
    before, after = (
        {t.name: t.raw_data for t in onnx.load(file).graph.initializer} for file in (small, path)
    )
    assert before.items() <= after.items()
    np.testing.assert_allclose(logits(path), logits(small)[:, -1:], atol=1e-3)


def test_data_stays_beside_the_model(decoder_folder: Path, tmp_path: Path) -> None:
    result = oc.optimize(
        decoder_folder / "model.onnx", tmp_path / "last.onnx", bits=4, logits_to_keep=1,
        external_data="always",
    )  # fmt: skip
    names = ["last.onnx", "last.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert result.report.output.bytes == sum((tmp_path / n).stat().st_size for n in names)
    assert logits(tmp_path / "last.onnx").shape == (2, 1, 320)


def model(*nodes: onnx.NodeProto, rank: int = 3, opset: int = 17) -> ir.Model:
    """A model from x ``(batch, length, 4)`` to logits by these nodes."""
    rng = np.random.default_rng(0)
    weights = {"w": (4, 6), "u": (4, 2), "v": (2, 6), "b": (6,), "rows": (5, 1), "shape": (3,)}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "l", 6, 1][:rank])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))


def node(op_type: str, *inputs: str, out: str = "logits") -> onnx.NodeProto:
    return helper.make_node(op_type, list(inputs), [out])


OVER_POSITIONS = (
    node("MatMul", "x", "w", out="y"),
    helper.make_node("Softmax", ["y"], ["logits"], axis=1),
)


@pytest.mark.parametrize(
    "nodes",
    [
        (node("MatMul", "x", "w"),),
        (node("MatMul", "x", "w", out="y"), node("Add", "b", "y")),
        (node("MatMul", "x", "w", out="y"), node("Tanh", "y", out="z"), node("Mul", "z", "b")),
        (node("MatMul", "x", "u", out="y"), node("MatMul", "y", "v")),
        (node("MatMul", "x", "w", out="y"), node("Softmax", "y")),
    ],
    ids=["product", "bias", "soft cap", "two factors", "probabilities"],
)
def test_what_stands_behind_the_product_does_not_matter(
    nodes: tuple[onnx.NodeProto, ...], tmp_path: Path
) -> None:
    changed = model(*nodes)
    keep_last_logits(changed, 2)
    for name, made in (("whole.onnx", model(*nodes)), ("last.onnx", changed)):
        onnx.save(ir.to_proto(made), tmp_path / name)
    feed = {"x": np.random.default_rng(1).standard_normal((3, 5, 4)).astype(np.float32)}
    whole, last = (
        run_session(oc.InferenceSession(tmp_path / name), feed)["logits"]
        for name in ("whole.onnx", "last.onnx")
    )
    np.testing.assert_allclose(last, whole[:, -2:], rtol=1e-6)
    # Everything that multiplies sees two rows: the slice is the first node.
    assert changed.graph[0].op_type == "Slice"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (model(node("MatMul", "x", "w"), rank=2), r"output 'logits' is \[b,l\]"),
        (model(node("MatMul", "x", "w"), opset=9), "in opset 9"),
        (model(node("Relu", "x")), "Relu gives 'logits', and no product"),
        (model(node("MatMul", "x", "w", out="y"), node("Add", "y", "rows")), "Add gives"),
        (model(node("Identity", "x")), "Identity gives"),
        (model(*OVER_POSITIONS), "Softmax gives"),
        (model(node("MatMul", "x", "w", out="y"), node("Softmax", "y"), opset=12), "Softmax gives"),
    ],
)
def test_other_models_are_refused(made: ir.Model, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        keep_last_logits(made, 1)
    assert "decoders" in caught.value.hint
