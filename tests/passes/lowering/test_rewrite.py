"""Payloads in the place of weights: same results, same interface, nothing left behind."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs.dense import DenseCodec
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.passes.ir.model import copy_model, load, output_size, save
from onnxcomp.passes.ir.traversal import scopes
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import DOMAIN

MODES = ("auto", "fused", "folded", "decode")


def zeros(item):
    key, layout = item
    return key, np.broadcast_to(np.zeros((), layout.dtype), layout.shape)


def placed(model, codec, mode="auto", *, virtual=False, only=None, **options):
    sites = find_sites(model, min_size=0, **options).sites
    params = codec.params_type()
    placements = []
    for site in sites:
        if only is None or site.name in only:
            payload = codec.encode(site, read_weight(model, site), params)
            if virtual:
                layout = codec.layout(site, params)
                payload = dataclasses.replace(payload, tensors=dict(map(zeros, layout.items())))
            placements.append(Placement(site, codec, payload, mode, params))
    return placements


def compressed(proto, codec, mode="auto", *, portable=True, **options):
    model = load(proto)
    canonicalize(model)
    change = rewrite(model, placed(model, codec, mode, **options), portable=portable)
    return model, change


def counts(model):
    found = {}
    for scope in scopes(model):
        for node in scope.graph:
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def close(tools, one, two, feeds, tolerance=1e-5):
    for first, second in zip(tools.run(one, feeds), tools.run(two, feeds), strict=True):
        assert first.dtype == second.dtype and first.shape == second.shape
        wide = [np.asarray(value, np.float64) for value in (first, second)]
        np.testing.assert_allclose(*wide, rtol=0, atol=tolerance * np.abs(wide[0]).max())


@pytest.mark.parametrize("go", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_results_stay(tools, half, mode, go):
    proto = tools.everything()
    model, change = compressed(proto, half, mode)
    feeds = {**tools.everything_feeds(), "go": np.array(go)}
    close(tools, proto, model, feeds)
    assert change.count == 9 and len(change.notes) == 8
    onnx.checker.check_model(tools.proto_of(model), full_check=True)


def test_each_mode_uses_its_operators(tools, half):
    dense = {"HalfWeight": 8}
    for mode, expected in {
        "auto": {"HalfMatMul": 6, "HalfGather": 1, "HalfWeight": 2},
        "fused": {"HalfMatMul": 6, "HalfGather": 1, "HalfWeight": 2},
        "folded": dense,
        "decode": {"HalfDecode": 8},
    }.items():
        model = compressed(tools.everything(), half, mode)[0]
        found = {op: n for op, n in counts(model).items() if op.startswith("Half")}
        assert found == expected, mode


def test_users_see_no_change_but_the_weights(tools, half):
    proto = tools.everything()
    result = tools.proto_of(compressed(proto, half)[0])
    for field in ("input", "output", "doc_string", "name"):
        assert getattr(result.graph, field) == getattr(proto.graph, field), field
    for field in ("doc_string", "producer_name", "model_version", "domain", "ir_version"):
        assert getattr(result, field) == getattr(proto, field), field
    imports = {entry.domain: entry.version for entry in result.opset_import}
    assert imports == {"": 17, DOMAIN: 1}
    entries = {entry.key: entry.value for entry in result.metadata_props}
    assert entries.pop("author") == "tests" and set(entries) == {"onnxcomp"}
    infos = {info.name: info for info in result.graph.value_info}
    assert infos["h"] == proto.graph.value_info[0] and "fc1" not in infos
    names = {tensor.name for tensor in result.graph.initializer}
    assert "bias" in names and not names & {"emb", "fc1", "outer", "lstm_w"}


def test_only_functions_that_are_called_come_along(tools, half):
    names = lambda model: sorted(key[1] for key in model.functions)  # noqa: E731
    proto = tools.everything()
    assert names(compressed(proto, half)[0]) == ["HalfGather", "HalfMatMul", "HalfWeight"]
    assert names(compressed(proto, half, "decode")[0]) == ["HalfDecode", "HalfWeight"]
    model = compressed(proto, half, portable=False)[0]
    assert not model.functions and model.opset_imports[DOMAIN] == 1
    assert not compressed(proto, DenseCodec())[0].opset_imports.get(DOMAIN)


def test_shared_tensors_are_stored_once(tools, half):
    model = compressed(tools.everything(), half)[0]
    shared = {name for name in model.graph.initializers if name.startswith(f"{DOMAIN}::")}
    keys = ("half.factor", "scalar.float32.0.5", "scalar.float32.2.0", "shape.1x256x64")
    assert shared == {f"{DOMAIN}::{key}" for key in keys}
    own = sorted(name for name in model.graph.initializers if name.endswith("::half"))
    assert own == sorted(f"{name}::half" for name in read_manifest(model))


def test_new_nodes_name_their_codec_and_take_over_names(tools, half):
    proto = tools.everything()
    proto.graph.node[1].name = "first product"
    result = tools.proto_of(compressed(proto, half)[0])
    ours = [node for node in result.graph.node if node.domain == DOMAIN]
    told = [{entry.key: entry.value for entry in node.metadata_props} for node in ours]
    assert told and all(entries["onnxcomp"] == "half" for entries in told)
    assert [node.op_type for node in ours if node.name == "first product"] == ["HalfMatMul"]


GEMMS = [
    (f"transA = {a}, transB = {b}, alpha = {alpha}, beta = {beta}", bias)
    for a in (0, 1)
    for b in (0, 1)
    for alpha, beta in ((1.0, 1.0), (0.5, 2.0), (1.0, 0.0))
    for bias in ("", ", row", ", grid")
]


@pytest.mark.parametrize(("attributes", "bias"), GEMMS)
def test_every_gemm_keeps_its_meaning(tools, half, attributes, bias):
    left = "16, 4" if "transA = 1" in attributes else "4, 16"
    shape = (8, 16) if "transB = 1" in attributes else (16, 8)
    weights = {"w": tools.weight(*shape), "row": tools.weight(8), "grid": tools.weight(4, 8)}
    used = {name: value for name, value in weights.items() if name in f"w{bias}"}
    proto = tools.build(
        f"g (float[{left}] a) => (float[4, 8] y) {{ y = Gemm <{attributes}> (a, w{bias}) }}", used
    )
    model = compressed(proto, half, only=["w"])[0]
    assert counts(model)["HalfMatMul"] == 1
    shape = (16, 4) if "transA = 1" in attributes else (4, 16)
    close(tools, proto, model, {"a": tools.weight(*shape, seed=9)})


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
def test_operator_sets_are_kept(tools, half, opset):
    proto = tools.build(
        """
        g (float[N, 16] x, int64[N] i) => (float[N, 8] y, float[N, 8] z, float[N, 5, 4, 4] c) {
            y = MatMul (x, w) z = Gather (w2, i) r = Reshape (y, image) c = Conv (r, k)
        }
        """,
        {
            "w": tools.weight(16, 8), "w2": tools.weight(16, 8, seed=1),
            "image": np.array([-1, 2, 2, 2]), "k": tools.weight(5, 2, 1, 1),
        },
        opset=opset,
    )  # fmt: skip
    proto.graph.output[2].CopyFrom(helper.make_tensor_value_info("c", 1, ["N", 5, 2, 2]))
    for mode in MODES:
        model = compressed(proto, half, mode)[0]
        assert model.opset_imports[""] == opset
        feeds = {"x": tools.weight(3, 16, seed=4), "i": np.array([0, 3, -1])}
        close(tools, proto, model, feeds)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_stays_half_precision(tools, half, dtype, mode):
    name = "float16" if dtype is np.float16 else "bfloat16"
    proto = tools.build(
        f"g (float[N, 16] a, int64[M] i) => ({name}[N, 8] y, {name}[M, 8] e) {{"
        f" x = Cast <to = {10 if dtype is np.float16 else 16}> (a)"
        " y = MatMul (x, w) e = Gather (table, i) }"
    )
    for tensor, values in {"w": tools.weight(16, 8), "table": tools.weight(16, 8, seed=1)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), tensor))
    model = compressed(proto, half, mode)[0]
    onnx.checker.check_model(tools.proto_of(model), full_check=True)
    if dtype is np.float16:
        feeds = {"a": tools.weight(3, 16), "i": np.array([1, 2])}
        close(tools, proto, model, feeds, tolerance=2e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cast_on_the_way_disappears_into_the_operator(tools, half, transposed):
    way = "t = Transpose (w) c = Cast <to = 1> (t)" if transposed else "c = Cast <to = 1> (w)"
    proto = tools.build(
        f"g (float[N, 16] x) => (float[N, 8] y) {{ {way} y = MatMul (x, c) }}",
        {"w": tools.weight(*((8, 16) if transposed else (16, 8)), dtype=np.float16)},
    )
    model = compressed(proto, half)[0]
    assert counts(model) == {"HalfMatMul": 1}
    assert next(iter(model.graph)).attributes["dtype"].as_int() == 1
    close(tools, proto, model, {"x": tools.weight(3, 16)})
    # The dense codec stores what it is given: there the Cast has to stay.
    plain = compressed(proto, DenseCodec())[0]
    assert counts(plain)["Cast"] == 1
    close(tools, proto, plain, {"x": tools.weight(3, 16)}, tolerance=0)


def test_a_way_that_others_use_stays(tools, half):
    proto = tools.build(
        """
        g (float[N, 16] x) => (float[N, 8] y, float[8, 16] z) {
            t = Transpose (w) y = Gemm <transB = 1> (x, t) z = Relu (t)
        }
        """,
        {"w": tools.weight(16, 8)},
    )
    model = compressed(proto, half)[0]
    assert counts(model) == {"HalfMatMul": 1, "HalfWeight": 1, "Transpose": 2, "Relu": 1}
    close(tools, proto, model, {"x": tools.weight(3, 16)})


def test_dense_uses_of_one_graph_share_one_decoded_weight(tools, half):
    proto = tools.build(
        """
        g (float[16, 8] x, bool c) => (float[16, 8] y, float[16, 8] z, float[16, 8] v) {
            y = Add (x, w) z = Mul (x, w)
            v = If (c) <
                then_branch = yes () => (float[16, 8] a) { b = Add (x, w) a = Mul (b, w) },
                else_branch = no () => (float[16, 8] d) { d = Identity (x) }
            >
        }
        """,
        {"w": tools.weight(16, 8)},
    )
    model, change = compressed(proto, half)
    assert change.count == 4 and counts(model)["HalfWeight"] == 2
    close(tools, proto, model, {"x": tools.weight(16, 8, seed=1), "c": np.array(True)})


def test_a_product_of_two_weights_is_rewired_on_both_sides(tools, half):
    proto = tools.build(
        "g (float[4, 8] x) => (float[4, 8] y) { p = MatMul (a, b) y = Add (x, p) }",
        {"a": tools.weight(4, 16), "b": tools.weight(16, 8)},
    )
    model = compressed(proto, half)[0]
    assert counts(model) == {"HalfMatMul": 1, "HalfWeight": 1, "Add": 1}
    close(tools, proto, model, {"x": tools.weight(4, 8, seed=7)})


def test_a_product_inside_a_branch_reads_its_weight_by_capture(tools, half):
    proto = tools.build(
        """
        g (float[N, 16] x, bool c) => (float[N, 8] y) {
            t = Transpose (w)
            y = If (c) <
                then_branch = yes () => (float[N, 8] a) { a = MatMul (x, t) },
                else_branch = no () => (float[N, 8] b) { b = MatMul (x, own) }
            >
        }
        """,
        {"w": tools.weight(8, 16)},
        inner={"no": {"own": tools.weight(16, 8, seed=1)}},
    )
    model = compressed(proto, half)[0]
    assert counts(model) == {"If": 1, "HalfMatMul": 2}
    assert all(not scope.graph.initializers for scope in scopes(model) if scope.path)
    for go in (True, False):
        close(tools, proto, model, {"x": tools.weight(3, 16), "c": np.array(go)})


def listed_product(tools, ir_version, opset=8):
    return tools.build(
        "g (float[2, 16] x) => (float[2, 8] y) { y = MatMul (x, w) }",
        {"w": tools.weight(16, 8), "other": tools.weight(4)},
        listed=True,
        ir_version=ir_version,
        opset=opset,
    )


def test_functions_raise_the_ir_version_and_unlist_constants(tools, half):
    result = tools.proto_of(compressed(listed_product(tools, 3), half)[0])
    assert result.ir_version == 8 and [value.name for value in result.graph.input] == ["x"]
    onnx.checker.check_model(result)
    for before, after in ((7, 8), (8, 8), (10, 10)):
        model = tools.everything()
        model.ir_version = before
        assert compressed(model, half)[0].ir_version == after


def test_without_functions_the_ir_version_stays(tools, half):
    for codec, portable in ((DenseCodec(), True), (half, False)):
        result = tools.proto_of(compressed(listed_product(tools, 3), codec, portable=portable)[0])
        assert result.ir_version == 3
        names = {tensor.name for tensor in result.graph.initializer}
        assert {value.name for value in result.graph.input} == {"x"} | names
    plain = compressed(listed_product(tools, 3), DenseCodec())[0]
    close(tools, listed_product(tools, 3), plain, {"x": tools.weight(2, 16)}, tolerance=0)


def test_overridable_weights_are_touched_only_when_frozen(tools, half):
    proto = listed_product(tools, 8)
    assert compressed(proto, half)[1].count == 0
    result = tools.proto_of(compressed(proto, half, freeze_inputs=True)[0])
    # The vector stays what it was: only what is compressed becomes a constant.
    assert [value.name for value in result.graph.input] == ["x", "other"]
    close(tools, proto, result, {"x": tools.weight(2, 16)})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("external", ["always", "never"])
def test_virtual_payloads_give_the_exact_size(tmp_path, tools, half, mode, external):
    model = load(tools.everything())
    canonicalize(model)
    planned = copy_model(model)
    rewrite(planned, placed(model, half, mode, virtual=True))
    size = output_size(planned, external_data=external, name="out.onnx")
    rewrite(model, placed(model, half, mode))
    saved = save(model, tmp_path / "out.onnx", external_data=external)
    assert size == saved.bytes == sum(file.stat().st_size for file in saved.files)


def test_mapped_payloads_stay_mapped(tmp_path, tools, half):
    model = load(tools.everything())
    canonicalize(model)
    (placement,) = placed(model, half, only=["fc1"])
    values = placement.payload.tensors["half"]
    values.tofile(tmp_path / "half.bin")
    mapped = np.memmap(tmp_path / "half.bin", values.dtype, "r", shape=values.shape)
    payload = dataclasses.replace(placement.payload, tensors={"half": mapped})
    rewrite(model, [dataclasses.replace(placement, payload=payload)])
    tensor = model.graph.initializers["fc1::half"].const_value
    assert np.shares_memory(tensor.numpy(), mapped)


def test_the_record_tells_what_was_done(tools, half):
    model = compressed(tools.everything(), half, "folded")[0]
    original = load(tools.everything())
    canonicalize(original)
    sites = {site.name: site for site in find_sites(original, min_size=0).sites}
    records = read_manifest(load(tools.proto_of(model)))
    assert set(records) == set(sites)
    for name, record in records.items():
        blank = dataclasses.replace(sites[name], uses=(), scope="")
        assert record.site == blank
        recipe = record.recipe
        assert (recipe.codec, recipe.mode, recipe.params) == ("half", "folded", {"strength": 1})
        assert (recipe.tensors, recipe.shared) == (["half"], ["half.factor"])
    entry = json.loads(model.metadata_props["onnxcomp"])
    assert len(entry["recipes"]) == 1 and entry["version"] == 1


def test_weights_can_be_compressed_one_after_the_other(tools, half):
    proto = tools.everything()
    model = load(proto)
    canonicalize(model)
    rewrite(model, placed(model, half, only=["fc1"]))
    model = load(tools.proto_of(model))
    canonicalize(model)
    found = find_sites(model, min_size=0)
    why = {tensor.name: tensor.reason for tensor in found.skipped}
    assert why["fc1::half"] == "part of a weight already compressed by onnxcomp"
    assert "fc1" not in {site.name for site in found.sites}
    rewrite(model, placed(model, half))
    assert len(read_manifest(model)) == 8
    close(tools, proto, model, tools.everything_feeds())


def test_a_shared_tensor_of_other_content_is_refused(tools, half):
    model = load(tools.everything())
    canonicalize(model)
    rewrite(model, placed(model, half, only=["fc1"]))
    (placement,) = placed(model, half, only=["fc2"])
    odd = Payload(placement.payload.tensors, {"half.factor": np.array([3.0], np.float32)})
    with pytest.raises(ModelError, match="other content"):
        rewrite(model, [dataclasses.replace(placement, payload=odd)])


def test_sites_of_another_model_are_refused(tools, half):
    model = load(tools.everything())
    canonicalize(model)
    placements = placed(model, half)
    other = load(tools.build("g (float[N] x) => (float[N] y) { y = Relu (x) }"))
    with pytest.raises(ModelError, match="no initializer 'emb'"):
        rewrite(other, placements)
    use = dataclasses.replace(placements[0].site.uses[0], node="lost")
    site = dataclasses.replace(placements[0].site, uses=(use,))
    with pytest.raises(ModelError, match="no node 'lost'"):
        rewrite(model, [dataclasses.replace(placements[0], site=site)])


def test_no_placements_change_nothing(tools):
    proto = tools.everything()
    model = load(proto)
    assert rewrite(model, []).count == 0
    assert tools.differences(proto, tools.proto_of(model)) == []
