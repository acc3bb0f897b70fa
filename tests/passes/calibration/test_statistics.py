"""Statistics of inputs are what a direct computation gives, and compression follows them."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.calibration import segmented_run, statistics
from onnxcomp.passes.calibration.segmented_run import segment_runner
from onnxcomp.passes.calibration.sources import unobservable
from onnxcomp.passes.calibration.statistics import (
    Calibration,
    collect,
    split_batches,
)
from onnxcomp.passes.codecs import anchoring, moments
from onnxcomp.passes.codecs.hyper.codec import HyperCodec, native
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import HeldMoments, HeldVectors, WeightSite

Array = npt.NDArray[Any]
WIDTH, TOKENS = 64, 40


@pytest.fixture(scope="module", autouse=True)
def encoder() -> None:
    if not native.available():
        pytest.skip("the encoder library is not built: set ONNXCOMP_ENCODERS_LIBRARY")


def build(path: Path, nodes: list[Any], tensors: dict[str, Array], inputs: list[Any]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def weights(*names: str, shape: tuple[int, ...] = (WIDTH, WIDTH)) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    return {n: rng.standard_normal(shape).astype(np.float32) / 8 for n in names}


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """y = relu(table[ids] @ q + table[ids] @ k) @ out, and a Gemm with its input transposed."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "q"], ["a"]),
        helper.make_node("MatMul", ["x", "k"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["h"]),
        helper.make_node("MatMul", ["h", "out"], ["o"]),
        helper.make_node("Reshape", ["o", "flat"], ["o2"]),
        helper.make_node("Transpose", ["o2"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["t", "last"], ["y"], transA=1, transB=1),
    ]
    tensors = weights("q", "k", "out", "last")
    tensors["table"] = np.random.default_rng(5).standard_normal((100, WIDTH)).astype(np.float32)
    tensors["flat"] = np.array([-1, WIDTH], np.int64)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    return build(tmp_path / "chain.onnx", nodes, tensors, [ids])


@pytest.fixture
def samples() -> list[dict[str, Array]]:
    rng = np.random.default_rng(7)
    return [{"ids": rng.integers(0, 100, (2, TOKENS))} for _ in range(20)]


def prepared(path: Path, min_size: int = 0) -> tuple[ir.Model, dict[str, WeightSite]]:
    model = load(path)
    canonicalize(model)
    return model, {site.name: site for site in find_sites(model, min_size=min_size).sites}


def exact(path: Path, value: str, feeds: list[dict[str, Array]]) -> Array:
    """All vectors of a value, by ONNX Runtime on the original model."""
    proto = onnx.load(path)
    proto.graph.output.append(onnx.ValueInfoProto(name=value))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    parts = [np.asarray(session.run([value], feed)[0]) for feed in feeds]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float64)


def test_moments_are_those_of_the_inputs(chain: Path, samples: list[dict[str, Array]]) -> None:
    model, sites = prepared(chain)
    found = {stats.site.name: stats for stats in collect(model, samples, list(sites.values()))}
    assert list(found) == ["q", "k", "out", "last"]
    assert found["q"].gram is found["k"].gram
    kept = samples[9::10]
    seen = [feed for feed in samples if not any(feed is other for other in kept)]
    for name, value in (("q", "x"), ("out", "h"), ("last", "o2")):
        x, held = exact(chain, value, seen), exact(chain, value, kept)
        stats = found[name]
        assert stats.tokens == len(x)
        np.testing.assert_allclose(stats.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-4, atol=1e-5)
        assert isinstance(stats.held, HeldMoments)
        wanted = held.T @ held / len(held)
        np.testing.assert_allclose(stats.held.inputs, wanted, rtol=1e-4, atol=1e-5)


def test_few_inputs_keep_their_last_vectors_back(
    chain: Path, samples: list[dict[str, Array]]
) -> None:
    model, sites = prepared(chain)
    (stats,) = collect(model, samples[:1], [sites["q"]])
    assert stats.tokens == 2 * TOKENS * 9 // 10
    x = exact(chain, "x", samples[:1])[stats.tokens :]
    assert isinstance(stats.held, HeldVectors)
    np.testing.assert_allclose(stats.held.inputs, x, rtol=1e-4, atol=1e-5)


def test_replaced_weights_are_seen_by_what_comes_later(
    chain: Path, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    model, sites = prepared(chain)
    other = np.random.default_rng(9).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4
    calibration = Calibration(model, samples, [sites["q"], sites["out"]])
    found = {}
    for group, stats in calibration:
        found[group[0].name] = stats
        if group[0].name == "q":
            calibration.replace(sites["q"], other)
    proto = onnx.load(chain)
    for tensor in proto.graph.initializer:
        if tensor.name == "q":  # stored (length, rows)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(other.T), "q"))
    onnx.save(proto, tmp_path / "other.onnx")
    changed, _ = prepared(tmp_path / "other.onnx")
    (wanted,) = collect(changed, samples, [sites["out"]])
    np.testing.assert_allclose(found["out"].gram, wanted.gram, rtol=1e-5)
    (crossed,) = collect(changed, samples, [sites["out"]], reference=model)
    assert crossed.lack is not None
    seen = [feed for number, feed in enumerate(samples) if number % 10 != 9]
    dense, new = exact(chain, "h", seen), exact(tmp_path / "other.onnx", "h", seen)
    weight = read_weight(model, sites["out"]).astype(np.float64)
    lack = weight @ (dense - new).T @ new / len(new)
    np.testing.assert_allclose(crossed.lack, lack, rtol=1e-3, atol=1e-4)


def test_wide_products_have_one_session_at_a_time(
    chain: Path, samples: list[dict[str, Array]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, sites = prepared(chain)
    runs: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        run, number = segment_runner(*args, **options), len(runs)
        return lambda held: runs.append(number) or run(held)

    monkeypatch.setattr(segmented_run, "segment_runner", watched)
    monkeypatch.setattr(segmented_run, "_MOST_HELD", 1)
    (place := tmp_path / "place").mkdir()
    found, turns = [], []
    for widest in (WIDTH + 1, WIDTH):
        monkeypatch.setattr(statistics, "_WIDE", widest)
        runs.clear()
        found += collect(model, samples, [sites["out"]], reference=model, folder=place)
        turns.append(sum(one != other for one, other in pairwise(runs)))
    assert turns == [2 * len(samples) - 1, 1]
    for name in ("gram", "lack", "mean"):
        one, other = (getattr(stats, name) for stats in found)
        np.testing.assert_array_equal(one, other)
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 1], "pads": [1, 0, 2, 1]},
        {"dilations": [2, 1], "pads": [2, 1, 2, 1], "auto_pad": "NOTSET"},
        {"auto_pad": "VALID", "strides": [2, 2]},
    ],
)
def test_moments_of_a_convolution_give_the_energy_of_its_output(
    tmp_path: Path, attributes: dict[str, Any]
) -> None:
    tensors = weights("w", shape=(8, 4, 3, 3))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 12, 11])
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    path = build(tmp_path / "conv.onnx", [node], tensors, [image])
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((2, 4, 12, 11)).astype(np.float32)} for _ in range(10)]
    model, sites = prepared(path)
    (stats,) = collect(model, feeds, list(sites.values()))
    session = onnxruntime.InferenceSession(path)
    y = np.stack([np.asarray(session.run(None, feed)[0]) for feed in feeds[:9]])
    weight = read_weight(model, sites["w"]).astype(np.float64)
    energy = np.trace(weight @ stats.gram @ weight.T)
    assert energy == pytest.approx(float(np.square(y).mean() * 8), rel=1e-4)
    assert stats.tokens == y.size // 8


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_moments_within_groups_are_those_of_the_outputs(tmp_path: Path, groups: int) -> None:
    tensors = weights("w", shape=(8, 4 // groups, 3, 3))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 12, 11])
    attributes = {"group": groups, "strides": [2, 1], "pads": [1, 0, 2, 1]}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    path = build(tmp_path / "conv.onnx", [node], tensors, [image])
    rng = np.random.default_rng(1)
    feeds = [{"x": 1 + rng.standard_normal((2, 4, 12, 11)).astype(np.float32)} for _ in range(20)]
    model, sites = prepared(path)
    ((_, stats),) = Calibration(model, feeds, [sites["w"]], reference=model, grouped=True)
    session = onnxruntime.InferenceSession(path)
    y = np.stack([np.asarray(session.run(None, feed)[0]) for feed in feeds])
    held = np.arange(20) % 10 == 9
    weight = read_weight(model, sites["w"]).astype(np.float64)
    assert stats.means is not None
    assert isinstance(stats.held, HeldMoments)
    assert stats.held.means is not None
    for means, some in ((stats.means, ~held), (stats.held.means, held)):
        products = moments.mean_products(weight, means.inputs)
        assert products == pytest.approx(y[some].mean(axis=(0, 1, 3, 4)), rel=1e-4)
    blocks = weight.reshape(groups, -1, weight.shape[1])
    grams = stats.gram if groups > 1 else stats.gram[None]
    energies = np.einsum("grl,glm,grm->gr", blocks, grams, blocks).reshape(-1)
    assert energies == pytest.approx(np.square(y[~held]).mean(axis=(0, 1, 3, 4)), rel=1e-4)


def test_means_alone_are_those_of_all_inputs(tmp_path: Path) -> None:
    tensors = weights("w", shape=(8, 1, 3, 3))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 9, 9])
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=8)
    path = build(tmp_path / "conv.onnx", [node], tensors, [image])
    feeds = [{"x": np.random.default_rng(1).standard_normal((3, 8, 9, 9)).astype(np.float32)}]
    model, sites = prepared(path)
    ((_, stats),) = Calibration(model, feeds, [sites["w"]], grouped=True, means=True)
    y = np.asarray(onnxruntime.InferenceSession(path).run(None, feeds[0])[0])
    assert stats.means is not None
    assert stats.held is None
    products = moments.mean_products(read_weight(model, sites["w"]), stats.means.inputs)
    assert products == pytest.approx(y.mean(axis=(0, 2, 3)), abs=1e-5)


def test_what_cannot_be_observed_has_a_reason(tmp_path: Path, chain: Path) -> None:
    model, sites = prepared(chain)
    assert unobservable(model, sites["table"]) == "only rows are looked up"
    assert unobservable(model, sites["q"]) == ""
    tensors = weights("w", shape=(8, 1, 3, 3))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=8)
    model, sites = prepared(build(tmp_path / "conv.onnx", [node], tensors, [image]))
    assert "groups" in unobservable(model, sites["w"])
    assert list(collect(model, [{"x": np.zeros((1, 8, 6, 6), np.float32)}], [sites["w"]])) == []


def test_inputs_that_are_not_finite_name_the_weight(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model, sites = prepared(build(tmp_path / "m.onnx", nodes, weights("w"), [x]))
    feed = {"x": np.full((4, WIDTH), np.nan, np.float32)}
    with pytest.raises(ModelError, match="'w' are NaN, infinite"):
        list(collect(model, [feed], list(sites.values())))


def test_too_little_data_is_told_with_the_number_needed(
    chain: Path, samples: list[dict[str, Array]], caplog: pytest.LogCaptureFixture
) -> None:
    model, sites = prepared(chain)
    with caplog.at_level(logging.WARNING):
        list(collect(model, samples[:1], [sites["q"]]))
    assert f"72 input vectors for {WIDTH} columns; {5 * WIDTH} or more" in caplog.text


def test_batches_are_cut_where_all_inputs_share_a_free_axis() -> None:
    feed = {"a": np.arange(40).reshape(20, 2), "b": np.arange(20)}
    parts = split_batches([feed], {"a": ("batch", 2), "b": ("batch",)})
    assert [len(part["b"]) for part in parts] == [2] * 10
    np.testing.assert_array_equal(np.concatenate([part["a"] for part in parts]), feed["a"])
    assert split_batches([feed], {"a": (20, 2), "b": ("batch",)}) == [feed]


def compiled(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    result = onnxcomp.optimize(model, output, min_size=0, bits=3, **options)
    return {site.name: site for site in result.report.sites}


def test_data_lowers_the_errors_of_products(
    chain: Path, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.concatenate([f["ids"] for f in samples]).astype(np.int32))
    data = tmp_path / "ids.npy"
    sites = compiled(chain, tmp_path / "a.onnx", data=data, tune=0, verify=False)
    compiled(chain, tmp_path / "plain.onnx", verify=False)
    compiled(chain, tmp_path / "off.onnx", data=data, calibration="off", verify=False)
    compiled(chain, tmp_path / "b.onnx", data=f"ids={data}", tune=0, jobs=1)
    same = [(tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx")]
    assert same[0] == same[1]
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "off.onnx").read_bytes()
    for name in ("q", "k", "out", "last"):
        assert 0 < sites[name].output_error < sites[name].weight_error
    assert sites["table"].output_error is None
    assert sites["table"].note == ""  # encoded for its look-ups
    wanted = exact(chain, "y", samples)
    errors = []
    for name in ("plain", "a"):
        session = onnxcomp.InferenceSession(tmp_path / f"{name}.onnx")
        found = np.concatenate([session.run(None, feed)[0] for feed in samples])
        errors.append(float(np.linalg.norm(found - wanted)))
    assert errors[1] < errors[0]


def test_behind_dense_weights_other_codes_are_found(
    chain: Path, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    given = {"data": samples, "tune": 0, "verify": False}
    compiled(chain, tmp_path / "a.onnx", **given)
    sites = compiled(chain, tmp_path / "b.onnx", calibration="parallel", **given)
    assert sites["out"].output_error is not None
    assert (tmp_path / "a.onnx").read_bytes() != (tmp_path / "b.onnx").read_bytes()


def test_later_weights_make_up_for_errors_of_earlier_ones(
    chain: Path, samples: list[dict[str, Array]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, errors = exact(chain, "y", samples), []
    for choose in (lambda *_: None, anchoring._anchor_damping):
        monkeypatch.setattr(anchoring, "_anchor_damping", choose)
        compiled(chain, tmp_path / "a.onnx", data=samples, verify=False)
        session = onnxcomp.InferenceSession(tmp_path / "a.onnx")
        found = np.concatenate([session.run(None, feed)[0] for feed in samples])
        errors.append(float(np.linalg.norm(found - wanted)))
    assert errors[1] < 0.97 * errors[0]


def test_plain_encoding_is_used_where_calibration_does_not_help(
    chain: Path, samples: list[dict[str, Array]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = HyperCodec()

    def spoiled(
        self: HyperCodec, site: WeightSite, weight: Array, params: Any, stats: Any, **options: Any
    ) -> Payload:
        return codec.encode(site, weight * np.float32(0.5), params)

    monkeypatch.setattr(HyperCodec, "encode_calibrated", spoiled)
    sites = compiled(chain, tmp_path / "a.onnx", data=samples, tune=0, verify=False)
    compiled(chain, tmp_path / "plain.onnx", verify=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert sites["q"].note.startswith("not calibrated: held-out output error 0.5")
    assert 0 < sites["q"].output_error < 0.3


def test_wrong_calibration_files_are_explained(chain: Path, tmp_path: Path) -> None:
    ids = np.zeros((4, TOKENS), np.int64)
    np.savez(tmp_path / "name.npz", tokens=ids)
    np.save(tmp_path / "type.npy", ids.astype(np.float32))
    np.save(tmp_path / "shape.npy", ids.reshape(2, 2, 2, -1))
    for name, message in (
        ("name.npz", "no input 'tokens'"),
        ("type.npy", "not float32"),
        ("shape.npy", "not of shape"),
        ("absent.npy", "cannot read"),
    ):
        with pytest.raises(UsageError, match=message):
            compiled(chain, tmp_path / "out.onnx", data=tmp_path / name)
    with pytest.raises(UsageError, match="'sequental' is unknown"):
        compiled(chain, tmp_path / "out.onnx", data=[{"ids": ids}], calibration="sequental")


def test_a_plain_array_needs_a_model_with_one_input(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "z")
    ]
    nodes = [
        helper.make_node("Add", ["x", "z"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
    ]
    path = build(tmp_path / "m.onnx", nodes, weights("w"), inputs)
    np.save(tmp_path / "x.npy", np.zeros((4, WIDTH), np.float32))
    with pytest.raises(UsageError, match="does not say which input"):
        compiled(path, tmp_path / "out.onnx", data=tmp_path / "x.npy")
