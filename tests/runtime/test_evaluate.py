"""Outputs of every kind come back as arrays."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.errors import ModelError
from onnxcomp.runtime.evaluate import iterate_model, run_model

SaveModel = Callable[..., Path]


def test_inputs_run_one_at_a_time(twins: tuple[Path, Path]) -> None:
    feeds = ({"ids": np.full((1, n), n)} for n in (1, 2, 3))
    outputs = iterate_model(twins[0], feeds)
    assert [result["logits"].shape for result in outputs] == [(1, 1, 40), (1, 2, 40), (1, 3, 40)]


def test_sequences_become_one_array_for_each_item(save_model: SaveModel, tmp_path: Path) -> None:
    nodes = [helper.make_node("SplitToSequence", ["x"], ["parts"], axis=0, keepdims=1)]
    path = save_model(nodes, {"x": (TensorProto.FLOAT, [2, 3])}, {})
    model = onnx.load(path)
    model.graph.output.append(
        helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    )
    onnx.save(model, path)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (result,) = run_model(path, [{"x": x}])
    assert list(result) == ["parts[0]", "parts[1]"]
    assert np.array_equal(result["parts[1]"], x[1:])


def test_maps_become_one_array_for_each_key(data_folder: Path) -> None:
    path = data_folder / "models" / "sklearn_randomforest.onnx"
    (result,) = run_model(path, [{"X": np.zeros((3, 4), np.float32)}])
    names = [name for name in result if name.startswith("output_probability.")]
    assert len(names) == 3
    assert np.allclose(sum(result[name] for name in names), np.ones(3), atol=1e-5)


def test_bfloat16_goes_in_and_out(save_model: SaveModel) -> None:
    kind = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "f"], ["s"]),
        helper.make_node("Cast", ["s"], ["y"], to=kind),
    ]
    path = save_model(nodes, {"x": (kind, ["n"])}, {"y": (kind, ["n"])})
    x = np.array([0.5, 3.0], ml_dtypes.bfloat16)
    (result,) = run_model(path, [{"x": x}])
    assert result["y"].dtype == ml_dtypes.bfloat16
    assert result["y"].astype(float).tolist() == [0.25, 9.0]
    (empty,) = run_model(path, [{"x": x[:0]}])
    assert empty["y"].shape == (0,)


def test_refused_inputs_are_explained(twins: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="cannot run the model"):
        run_model(twins[0], [{"ids": np.zeros((1, 2), np.float32)}])
