"""Large models are pruned in little memory: to the same bytes, and by the same losses."""

from pathlib import Path

import numpy as np
import pytest

import onnxcomp
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.prune import hollow
from onnxcomp.passes.transforms.prune.obs import Surgeon, Unseen, damping


@pytest.mark.parametrize("turned", [False, True])
def test_losses_of_inputs_that_nothing_is_known_of(turned: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
    weight = np.asfortranarray(weight) if turned else weight
    gram = np.eye(40)
    surgeon, unseen = Surgeon(weight, gram, damping(gram)), Unseen(weight)
    assert unseen.energy == pytest.approx(surgeon.energy)
    assert Unseen(weight, 3).energy == pytest.approx(3 * surgeon.energy)
    for columns in (np.array([3]), np.array([1, 7, 8]), np.array([3, 4])):
        pairs = np.arange(20, 32).reshape(6, 2)
        np.testing.assert_allclose(unseen.losses(pairs), surgeon.losses(pairs), rtol=1e-9)
        if 3 not in columns or len(columns) == 1:
            assert unseen.remove(columns) == pytest.approx(surgeon.remove(columns))
    assert unseen.losses(np.array([[3]]))[0] == 0.0


def test_sizes_and_bytes_do_not_depend_on_what_stands_for_weights(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder_folder / "model.onnx"
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    onnxcomp.optimize(model, whole, bits=4, prune_ratio=0.3, min_size=1024, verify=False)
    monkeypatch.setattr(hollow, "_LEAST", 1)
    monkeypatch.setattr(hollow, "_SMALL", 1 << 10)
    lean = hollow.for_sizes(load(model))
    assert "model.embed_tokens.weight" not in lean.graph.initializers
    assert [node.op_type for node in lean.graph].count("ConstantOfShape") > 10
    onnxcomp.optimize(model, small, bits=4, prune_ratio=0.3, min_size=1024, verify=False)
    assert small.read_bytes() == whole.read_bytes()
