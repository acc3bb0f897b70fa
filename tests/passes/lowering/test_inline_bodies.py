"""Definitions in the place of calls: the same results, operators of ONNX only, and a way back."""

import collections
import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.traversal import scopes
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.inline_bodies import inline_bodies
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.report.form import form_of
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import DOMAIN

CODEC_NAMES = ("hyper", "hash", "lowrank+hyper", "hyper+lowrank", "winding")


def placements(model, codec, mode="auto"):
    found = []
    for site in find_sites(model, min_size=0).sites:
        if codec.refuse(site) is None:
            ranked = "rank" in {field.name for field in dataclasses.fields(codec.params_type)}
            params = codec.params_type(rank=8) if ranked else codec.params_type()
            payload = codec.encode(site, read_weight(model, site), params)
            found.append(Placement(site, codec, payload, mode, params))
    return found


def compressed(proto, codec, mode="auto"):
    model = load(proto)
    canonicalize(model)
    placed = placements(model, codec, mode)
    assert placed
    rewrite(model, placed)
    return model


def operators(model):
    return collections.Counter(node.op_type for scope in scopes(model) for node in scope.graph)


def near(one, two, tolerance=1e-6):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("mode", ["auto", "folded", "decode"])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_every_codec_computes_the_same_and_expands_the_same(tools, name, mode):
    proto, feeds = tools.everything(), tools.everything_feeds()
    small = tools.proto_of(compressed(proto, CODECS[name], mode))
    model = load(small)
    change = inline_bodies(model)
    assert change.count > 0 and form_of(model).name == "inlined"
    plain = tools.proto_of(model)
    assert [entry.domain for entry in plain.opset_import] == [""] and not plain.functions
    onnx.checker.check_model(plain, full_check=True)
    near(tools.run(plain, feeds), tools.run(small, feeds))
    back, reference = load(plain), load(small)
    assert expand(back).count == expand(reference).count
    assert operators(back) == operators(reference)
    assert not [name for name in back.graph.initializers if name.startswith(DOMAIN)]
    near(tools.run(back, feeds), tools.run(reference, feeds), 0)


PRODUCT = """
product (float[N, 256] x, int64[M] ids) => (float[N, 40] y, float[M, 256] rows) {
    y = MatMul (x, w)
    rows = Gather <axis = 0> (emb, ids)
}
"""


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
def test_every_opset(tools, opset):
    weights = {"w": tools.weight(256, 40), "emb": tools.weight(50, 256)}
    proto = tools.build(PRODUCT, weights, opset=opset)
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    feeds = {"x": x, "ids": np.array([0, 49, 7])}
    small = tools.proto_of(compressed(proto, CODECS["hyper"]))
    model = load(small)
    inline_bodies(model)
    near(tools.run(model, feeds), tools.run(small, feeds))


def test_types_at_the_use_come_back(tools):
    text = "g (float16[N, 128] x) => (float16[N, 40] y) { y = MatMul (x, w) }"
    proto = tools.build(text, {"w": tools.weight(128, 40, dtype=np.float16)})
    cast = "g (float[N, 128] x) => (float[N, 40] y) { c = Cast <to = 1> (w) y = MatMul (x, c) }"
    for each in (proto, tools.build(cast, {"w": tools.weight(128, 40, dtype=np.float16)})):
        model = load(tools.proto_of(compressed(each, CODECS["hyper"])))
        reference = load(tools.proto_of(model))
        inline_bodies(model)
        expand(model)
        expand(reference)
        assert operators(model) == operators(reference)
        kind = np.float16 if each is proto else np.float32
        near(*(tools.run(m, {"x": np.ones((2, 128), kind)}) for m in (model, reference)), 0)


def test_the_reference_evaluator_of_onnx_runs_it(tools):
    proto = tools.build(PRODUCT, {"w": tools.weight(256, 40), "emb": tools.weight(50, 256)})
    feeds = {"x": np.ones((2, 256), np.float32), "ids": np.array([3])}
    model = compressed(proto, CODECS["hyper"])
    inline_bodies(model)
    near(ReferenceEvaluator(tools.proto_of(model)).run(None, feeds), tools.run(model, feeds), 1e-5)


def folded_bytes(tools, model, tmp_path):
    """Size of the model that ONNX Runtime saves when it has optimised this one."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    content = tools.proto_of(model).SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return load(tmp_path / "optimised.onnx"), (tmp_path / "optimised.onnx").stat().st_size


@pytest.mark.parametrize("shape", ["N, 256", "3, 256"])
def test_codes_that_must_not_be_folded_are_not(tools, tmp_path, shape):
    text = f"g (float[{shape}] x) => (float[{shape.split(',')[0]}, 512] y) {{ y = MatMul (x, w) }}"
    proto = tools.build(text, {"w": tools.weight(256, 512)})
    small = compressed(proto, CODECS["hyper"])
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)}
    wanted = tools.run(small, feeds)
    held, open_ = load(tools.proto_of(small)), load(tools.proto_of(small))
    inline_bodies(held, foldable=False)
    inline_bodies(open_)
    near(tools.run(held, feeds), wanted)
    saved, size = folded_bytes(tools, held, tmp_path)
    assert size < 0.5 * 4 * 256 * 512 and not form_of(saved).undone
    undone, size = folded_bytes(tools, open_, tmp_path)
    assert size > 4 * 256 * 512
    assert form_of(undone).undone == ("w",) and "folded" in form_of(undone).notes[0]
    expand(held)
    near(tools.run(held, feeds), wanted)


def test_no_value_an_input_may_have_changes_the_result(tools):
    proto = tools.build(
        "g (float[2, 128] x) => (float[2, 40] y) { y = MatMul (x, w) }",
        {"w": tools.weight(128, 40)},
    )
    model = compressed(proto, CODECS["hyper"])
    inline_bodies(model, foldable=False)
    for first in (0.0, -3.0, np.inf, np.nan):
        x = np.ones((2, 128), np.float32)
        x[0, 0] = first
        assert np.isfinite(tools.run(model, {"x": x})[0][1]).all()


def test_models_that_cannot_be_inlined_are_refused(tools):
    proto = tools.build(
        "g () => (float[50, 40] y) { y = MatMul (x, w) }",
        {"w": tools.weight(128, 40), "x": tools.weight(50, 128)},
    )
    with pytest.raises(ModelError, match="no input"):
        inline_bodies(compressed(proto, CODECS["hyper"]), foldable=False)
    model = load(proto)
    canonicalize(model)
    rewrite(model, placements(model, CODECS["hyper"]), portable=False)
    with pytest.raises(ModelError, match="no definition of Hyper"):
        inline_bodies(model)
    with pytest.raises(UsageError, match="portable is false"):
        Settings(bits=4, functions="inline", portable=False)


def test_models_of_before_are_inlined_as_well(tools):
    """Nothing new is placed: calls that were there are inlined."""
    model = load(tools.proto_of(compressed(tools.everything(), CODECS["hyper"])))
    lower(model, [], functions="inline")
    assert form_of(model).name == "inlined"
