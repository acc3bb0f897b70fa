"""Looking into models and comparing two."""

import json

import pytest

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.report.inspect import diff, inspect_model
from onnxcomp.passes.transforms.canonicalize import canonicalize


@pytest.fixture
def pair(tmp_path, tools, half):
    """A dense model and its compressed form, as files."""
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    save(load(tools.everything()), dense, external_data="always")
    model = load(dense)
    canonicalize(model)
    params = half.params_type()
    sites = [site for site in find_sites(model, min_size=0).sites if site.name != "fc2"]
    rewrite(
        model,
        [
            Placement(
                site, half, half.encode(site, read_weight(model, site), params), "auto", params
            )
            for site in sites
        ],
    )
    save(model, small)
    return dense, small


def test_a_dense_model_is_described(pair):
    found = inspect_model(pair[0], min_size=0)
    assert found.bytes == sum(path.stat().st_size for path in pair[0].parent.glob("dense*"))
    assert [value.name for value in found.inputs] == ["ids", "go"]
    assert found.inputs[0].shape == ("N",) and found.inputs[0].dtype == "int64"
    assert found.outputs[1].shape == ("N", 48)
    assert found.operators["MatMul"] == 5 and found.operators["LSTM"] == 1
    assert found.opsets == {"": 17} and not found.compressed and not found.functions
    assert {site.name for site in found.sites} >= {"emb", "fc1", "own", "lstm_w"}
    assert found.site_bytes == sum(site.nbytes for site in found.sites)
    assert [tensor.name for tensor in found.skipped] == ["bias"]


def test_a_compressed_model_tells_what_was_done(pair):
    found = inspect_model(pair[1], min_size=0)
    by_name = {weight.name: weight for weight in found.compressed}
    assert len(by_name) == 7 and [site.name for site in found.sites] == ["fc2"]
    tied = by_name["emb"]
    assert (tied.codec, tied.mode, tied.params) == ("half", "auto", {"strength": 1})
    assert set(tied.operators) == {"HalfGather", "HalfMatMul"}
    assert tied.bytes_before == tied.bytes_after == 100 * 64 * 4
    assert found.shared_bytes >= 4 and len(found.functions) == 3


@pytest.mark.parametrize("which", [0, 1])
def test_the_description_is_plain_json(pair, which):
    text = json.dumps(inspect_model(pair[which], min_size=0).to_json())
    entry = json.loads(text)
    assert entry["sites"][0]["nbytes"] > 0 and "site_bytes" in entry


def test_comparing_shows_what_changed_and_nothing_else(pair):
    dense, small = (inspect_model(path, min_size=0) for path in pair)
    change = diff(dense, small)
    assert change.interface == ()
    assert change.opsets == {"com.onnxcomp": (None, 1)}
    assert change.operators["MatMul"] == (5, 1)
    assert change.operators["com.onnxcomp::HalfMatMul"] == (0, 5)
    assert set(change.weights) == {site.name for site in dense.sites} - {"fc2"}
    assert change.weights["fc1"] == ("float32, 32,768 bytes", "half, 32,768 bytes")
    assert json.loads(json.dumps(change.to_json()))["bytes"] == [dense.bytes, small.bytes]
    same = diff(dense, dense)
    assert not (same.operators or same.weights or same.interface or same.opsets)


def test_another_interface_is_shown(tmp_path, tools, pair):
    model = tools.everything()
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    change = diff(inspect_model(pair[0]), inspect_model(path))
    assert len(change.interface) == 1 and "'rows', 100" in change.interface[0]


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        inspect_model(tmp_path / "x.onnx")
