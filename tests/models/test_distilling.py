"""Short trainings of shared memories towards the outputs of the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.calibration.perturbation import made_up_inputs, stored_form
from onnxcomp.passes.codecs.protocol import SharedValues
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize

torch = pytest.importorskip("torch")

from onnxcomp.models.distilling import distill  # noqa: E402

LENGTH, HIDDEN = 48, 64
FOLDED = ".*:method=hash,map=fold,compression=4,memory=float16,limit=2"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two products with a norm, an activation and a residual; and inputs of few dimensions."""
    rng = np.random.default_rng(0)
    tensors = {
        "up": rng.standard_normal((LENGTH, HIDDEN)) / 7,
        "down": rng.standard_normal((HIDDEN, LENGTH)) / 8,
        "scale": 1 + 0.1 * rng.standard_normal(LENGTH),
        "bias": 0.1 * rng.standard_normal(LENGTH),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "down"], ["c"]),
        helper.make_node("Add", ["c", "x"], ["d"]),
        helper.make_node("LayerNormalization", ["d", "scale", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LENGTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", LENGTH])],
        [numpy_helper.from_array(array.astype(np.float32), n) for n, array in tensors.items()],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx")
    space = rng.standard_normal((6, LENGTH))
    x = rng.standard_normal((800, 6)) @ space + 0.1 * rng.standard_normal((800, LENGTH))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    return tmp_path / "m.onnx"


def error(model: Path, steps: int) -> tuple[float, list[str]]:
    """Relative error of the outputs on the training inputs, and the notes of the weights."""
    result = onnxcomp.optimize(
        model,
        model.with_name("out.onnx"),
        method="hash",
        min_size=0,
        set_=FOLDED,
        data=model.with_name("x.npz"),
        distill=steps,
        precision="exact",
    )
    assert result.verify is not None and result.verify.passed
    feed = dict(np.load(model.with_name("x.npz")))
    (exact,) = onnxcomp.InferenceSession(model).run(None, feed)
    (found,) = onnxcomp.InferenceSession(model.with_name("out.onnx")).run(None, feed)
    notes = [site.note for site in result.report.sites if site.method == "hash"]
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact)), notes


def test_distilling_brings_the_outputs_nearer_and_says_by_how_much(model: Path) -> None:
    plain, _ = error(model, 0)
    trained, notes = error(model, 200)
    assert len(notes) == 2 and all("distilled 0." in note for note in notes)
    assert trained < 0.9 * plain


def test_distilling_twice_gives_the_same_bytes(model: Path) -> None:
    files = []
    for _ in range(2):
        error(model, 20)
        files.append(model.with_name("out.onnx").read_bytes())
    assert files[0] == files[1]


def test_there_must_be_something_to_distill_from(model: Path) -> None:
    with pytest.raises(UsageError, match="distill"):
        onnxcomp.optimize(model, model.with_name("o.onnx"), method="hash", set_=FOLDED, distill=5)
    with pytest.raises(UsageError, match="-1"):
        onnxcomp.optimize(model, model.with_name("o.onnx"), distill=-1)


def identical(path: Path) -> tuple[Any, list[SharedValues]]:
    """A canonical model, and its weights as copies of themselves."""
    model = load(path)
    canonicalize(model)
    found = []
    for site in find_sites(model, min_size=0).sites:
        values = stored_form(site, read_weight(model, site)).astype(np.float32).reshape(-1)
        index, ones = np.arange(len(values)), np.ones(len(values), np.float32)
        found.append(SharedValues(site.name, site.shape, values, index, ones))
    return model, found


@pytest.mark.parametrize(
    "name", ["models/winml_cifar_classifier", "models/resnet20_cifar10", "lm/tinyllama_ref"]
)
def test_torch_computes_what_the_runtime_does(data_folder: Path, name: str) -> None:
    path = data_folder / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"no model at {path}")
    model, found = identical(path)
    feeds = made_up_inputs(model, samples=10)
    _, before, after = distill(model, found, feeds, 0, lambda _, values: values, fixed={})
    assert before == after < 1e-4


def test_an_operator_that_is_not_known_is_named(model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.node[1].op_type = "Selu"
    onnx.save(proto, model)
    loaded, found = identical(model)
    feeds = made_up_inputs(loaded, samples=10)
    with pytest.raises(ModelError, match="Selu"):
        distill(loaded, found, feeds, 0, lambda _, values: values, fixed={})
    with pytest.raises(ModelError, match="few"):
        distill(loaded, found, feeds[:5], 0, lambda _, values: values, fixed={})
