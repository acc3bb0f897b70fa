"""Scales are moved along true gradients, for the outputs, and only where that helps."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.lowrank.codec import LowRankParams
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.encoding import tuning
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.encoding.scale_gradients import Groups, ScaleGradients
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.transforms.canonicalize import canonicalize

Array = npt.NDArray[Any]
WIDTH, WORDS, TOKENS = 64, 96, 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A block between a table and the head that is tied to it."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, WIDTH), "up": (WIDTH, 160), "down": (160, WIDTH)}
    fixed = [
        numpy_helper.from_array((rng.standard_normal(s) / 6).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "up"], ["u"]),
        helper.make_node("Tanh", ["u"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["d"]),
        helper.make_node("Add", ["x", "d"], ["y"]),
        helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [ids], [logits], fixed)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def samples(count: int = 30) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(0, WORDS, (1, TOKENS))} for _ in range(count)]


def encoded_by(path: Path, name: str, params: Params) -> tuple[Any, list[EncodedWeight]]:
    model = load(path)
    canonicalize(model)
    codec, found = CODECS[name], []
    for site in find_sites(model).sites:
        weight = read_weight(model, site)
        payload = codec.encode(site, weight, params)
        choice = Choice(site.name, site.shape, site.dtype, (), site.nbytes, name, params)
        error = weight_error(weight, codec.decode(site, payload))
        found.append(EncodedWeight(site, choice, payload, error))
    return model, found


def encoded(path: Path, bits: int = 2) -> tuple[Any, list[EncodedWeight]]:
    return encoded_by(path, "hyper", HyperParams(bits=bits, group=64))


def test_gradients_are_those_of_scales(path: Path, tmp_path: Path) -> None:
    """Against finite differences of the loss, in random directions."""
    model, weights = encoded(path)
    scales = tuning._all_scales(weights)
    run = ScaleGradients(model, [], [part.groups for part in scales.values()], tmp_path)
    stored = {name: part.value for name, part in scales.items()}
    _, gradients = run(samples(1)[0], stored)
    assert set(gradients) == {"table", "up", "down"}
    rng = np.random.default_rng(2)
    for name, part in scales.items():
        groups: Groups = part.groups
        way = rng.standard_normal((groups.site.rows, groups.count)).astype(np.float32)
        columns = way @ groups.spread()
        turned = columns.T if groups.site.transposed else columns
        losses = []
        for sign in (1, -1):
            moved = stored[name] * np.exp(sign * 0.01 * turned).reshape(stored[name].shape)
            losses.append(run(samples(1)[0], {**stored, name: moved})[0])
        slope = (losses[0] - losses[1]) / 0.02
        assert float((gradients[name] * way).sum()) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_scales_alone_change_and_the_loss_falls(path: Path) -> None:
    model, weights = encoded(path)
    found = tuning.tune(model, weights, samples(), 4)
    assert found is not None
    assert found.after < 0.97 * found.before
    for before, after in zip(weights, found.weights, strict=True):
        assert before.payload is not None
        assert after.payload is not None
        assert np.array_equal(before.payload.tensors["codes"], after.payload.tensors["codes"])
        scales = [part.payload.tensors["scales"] for part in (before, after) if part.payload]
        assert 0 < np.abs(scales[1].astype(float) / scales[0] - 1).max() < 0.3
        assert after.error != before.error


def test_worse_scales_are_not_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "RATE", -2e-3)
    model, weights = encoded(path)
    found = tuning.tune(model, weights, samples(), 2)
    assert found is not None
    assert found.after > found.before
    assert found.weights == weights


def test_few_inputs_and_no_scales_tune_nothing(path: Path) -> None:
    model, weights = encoded(path)
    assert tuning.tune(model, weights, samples(9), 1) is None
    assert tuning.tune(model, [], samples(), 1) is None


def test_the_option_tunes_and_repeats(path: Path, tmp_path: Path) -> None:
    outputs, errors = {}, {}
    for name, passes in (("none", 0), ("once", 3), ("again", 3)):
        result = onnxcomp.optimize(
            path, tmp_path / f"{name}.onnx", method="hyper", bits=2, min_size=0,
            data=samples(), tune=passes, verify=False, set_=[".*:group=64"],
        )  # fmt: skip
        errors[name] = {site.name: site.output_error for site in result.report.sites}
        outputs[name] = (tmp_path / f"{name}.onnx").read_bytes()
    assert outputs["once"] == outputs["again"] != outputs["none"]
    assert len(outputs["once"]) == len(outputs["none"])
    # What was measured of the codes before is not said of those that were written.
    assert all(error is not None for error in errors["none"].values())
    assert set(errors["once"].values()) == {None}


def factored(path: Path) -> tuple[Any, list[EncodedWeight]]:
    return encoded_by(path, "lowrank", LowRankParams(16))


def test_gradients_are_those_of_factors(path: Path, tmp_path: Path) -> None:
    """Against finite differences, for a table that is looked up and multiplied with, too."""
    model, weights = factored(path)
    placements = list(tuning._all_factored(weights).values())
    run = ScaleGradients(model, [], [], tmp_path, (), placements)
    stored = {n: part.value for n, part in tuning._tensors(placements, tmp_path).items()}
    feed, rng = samples(1)[0], np.random.default_rng(2)
    _, gradients = run(feed, stored)
    assert set(gradients) == set(stored)
    for name, array in stored.items():
        way = (rng.standard_normal(array.shape) * array.std()).astype(np.float32)
        losses = [run(feed, {**stored, name: array + s * 0.01 * way})[0] for s in (1, -1)]
        slope = (losses[0] - losses[1]) / 0.02
        assert float((gradients[name] * way).sum()) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_factors_change_and_the_loss_falls(path: Path) -> None:
    model, weights = factored(path)
    found = tuning.tune(model, weights, samples(), 4)
    assert found is not None
    assert found.after < 0.97 * found.before
    for before, after in zip(weights, found.weights, strict=True):
        assert before.payload is not None
        assert after.payload is not None
        assert after.payload.tensors.keys() == before.payload.tensors.keys()
        for key, array in before.payload.tensors.items():
            assert after.payload.tensors[key].dtype == np.float32
            assert not np.array_equal(after.payload.tensors[key], array)
        assert after.error > before.error  # by values nothing is better than where it began


def test_factors_in_files_become_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = factored(path)
    found = []
    for held in (1 << 26, 0):
        monkeypatch.setattr(tuning, "_HELD", held)
        tuned = tuning.tune(model, weights, samples(), 2)
        assert tuned is not None
        found.append([part.payload.tensors for part in tuned.weights if part.payload])
    for here, there in zip(*found, strict=True):
        assert all(np.array_equal(array, there[key]) for key, array in here.items())
