"""Outputs that hold a cache: found by their names, and left out of what sensitivities measure."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.analysis.cache_outputs import is_cache, without_caches
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.calibration.sensitivity import measure_sensitivities
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize

WIDTH = 160


def _branches(path: Path, second: str) -> Path:
    """``y = x A``, and ``x B`` as an output of another name, with a batch axis more."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32), name)
        for name in ("a", "b")
    ]
    sizes = ["batch", 4, WIDTH]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["logits"], "first"),
            helper.make_node("MatMul", ["x", "b"], [second], "second"),
        ],
        "branches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes) for n in ("logits", second)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def _named(name: str, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def test_names_and_ranks_of_caches() -> None:
    """Names of three exporters are known; flat outputs and other words are none."""
    for name in ("present.0.key", "past_key_values.1.value", "key_cache_0"):
        assert is_cache(_named(name, (1, 2, 3, 4)))
    assert not is_cache(_named("present_count", (1, 2)))
    assert not is_cache(_named("representation", (1, 2, 3, 4)))


def test_a_model_keeps_its_other_outputs(tmp_path: Path) -> None:
    """Only caches go, from a copy, and a model of caches alone stays whole."""
    model = load(_branches(tmp_path / "m.onnx", "present.0.key"))
    assert [value.name for value in without_caches(model).graph.outputs] == ["logits"]
    assert len(model.graph.outputs) == 2
    del model.graph.outputs[0]
    assert without_caches(model) is model


def test_sensitivities_do_not_look_at_caches(tmp_path: Path) -> None:
    """A weight that only a cache depends on has none; under another name it has."""
    feeds = [{"x": np.random.default_rng(1).standard_normal((1, 4, WIDTH), dtype=np.float32)}]
    found = []
    for second in ("present.0.key", "features"):
        model = load(_branches(tmp_path / "m.onnx", second))
        canonicalize(model)
        sites = find_sites(model).sites
        found.append(measure_sensitivities(model, sites, feeds).noise)
    assert set(found[0]) == {"a"}
    assert set(found[1]) == {"a", "b"}
