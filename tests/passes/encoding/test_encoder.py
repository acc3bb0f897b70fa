"""Encoding a plan: order, memory, progress, the cache, and weights that must stay dense."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper import feedback
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.hyper.feedback import Coder
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.encoding import encoded
from onnxcomp.passes.encoding import encoder as module
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.encoding.encoder import encode
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.tensors import not_finite
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.plan import Budget, Plan, Source
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import Array, WeightSite

RNG = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(weights: dict[str, Array]) -> ir.Model:
    """A chain of products, one for each weight."""
    nodes, name = [], "x"
    for index, weight in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [name, weight], [f"y{index}"], name=f"n{index}"))
        name = f"y{index}"
    rows, columns = next(iter(weights.values())).shape[0], [*weights.values()][-1].shape[1]
    float_ = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", float_, ["n", rows])],
        [helper.make_tensor_value_info(name, float_, ["n", columns])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = load(proto)
    canonicalize(model)
    return model


@pytest.fixture
def model() -> ir.Model:
    return model_of({"a": normal(64, 96), "b": normal(96, 80), "c": normal(80, 200)})


def plan_for(model: ir.Model, bits: int = 3) -> tuple[tuple[WeightSite, ...], Plan]:
    sites = find_sites(model, min_size=0).sites
    hyper, params = CODECS["hyper"], HyperParams(bits)
    choices = {}
    for site in sites:
        kept = Choice.kept_dense(site, "for a reason")
        settled = kept.with_(codec="hyper", bits=params.bits).settle(site)
        assert settled.bytes == hyper.size(site, params)
        choices[site.name] = settled
    return sites, Plan(Source("", 0, None), Settings(), Budget(bits=bits), choices)


def equal(one: EncodedWeight, other: EncodedWeight) -> bool:
    if one.placement is None or other.placement is None:
        return one.placement is other.placement and one.reason == other.reason
    first, second = one.placement.payload, other.placement.payload
    return (
        one.error == other.error
        and first.attributes == second.attributes
        and first.tensors.keys() == second.tensors.keys()
        and all(np.array_equal(first.tensors[key], second.tensors[key]) for key in second.tensors)
    )


def test_weights_are_encoded_in_the_order_of_the_sites(model: ir.Model) -> None:
    sites, plan = plan_for(model)
    plan["b"] = Choice.kept_dense(sites[1], "for a reason")
    found = encode(model, sites, plan)
    assert [item.site.name for item in found] == ["a", "b", "c"]
    assert [item.placement is None for item in found] == [False, True, False]
    assert (found[1].reason, found[1].error) == ("for a reason", 0.0)
    for item in (found[0], found[2]):
        assert item.placement is not None
        assert item.placement.params == plan[item.site.name].params
        decoded = CODECS["hyper"].decode(item.site, item.placement.payload)
        assert item.error == weight_error(read_weight(model, item.site), decoded)
        assert 0.1 < item.error < 0.2


def test_the_bytes_do_not_depend_on_the_number_of_threads(model: ir.Model) -> None:
    sites, plan = plan_for(model)
    one, three = encode(model, sites, plan, jobs=1), encode(model, sites, plan, jobs=3)
    assert all(equal(a, b) for a, b in zip(one, three, strict=True))


def test_large_payloads_come_back_from_a_file_without_a_name(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, plan = plan_for(model)
    plan["b"] = Choice.kept_dense(sites[1], "for a reason")
    in_memory = encode(model, sites, plan)
    monkeypatch.setattr(module, "SPILL_BYTES", 0)
    spilled = encode(model, sites, plan, folder=tmp_path)
    assert all(equal(a, b) for a, b in zip(in_memory, spilled, strict=True))
    assert list(tmp_path.iterdir()) == []
    assert spilled[0].placement is not None
    for array in spilled[0].placement.payload.tensors.values():
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0


def test_progress_counts_dense_bytes(model: ir.Model) -> None:
    sites, plan = plan_for(model)
    plan["a"] = Choice.kept_dense(sites[0], "for a reason")
    told: list[tuple[int, int, str]] = []
    encode(model, sites, plan, progress=lambda *now: told.append(now))
    b, c = sites[1].nbytes, sites[2].nbytes
    assert told == [(0, b + c, "b"), (b, b + c, "c"), (b + c, b + c, "")]


class Counting:
    """The hyper codec, counting the weights it encodes."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hyper, name)

    _hyper = CODECS["hyper"]

    def encode(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        return self._hyper.encode(*args, **options)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    codec = Counting()
    monkeypatch.setitem(CODECS, "hyper", codec)  # type: ignore[arg-type]
    yield codec


def test_what_is_in_the_cache_is_not_encoded_again(
    model: ir.Model, tmp_path: Path, counting: Counting
) -> None:
    sites, plan = plan_for(model)
    cache = PayloadCache(tmp_path)
    first = encode(model, sites, plan, cache=cache)
    assert counting.count == 3
    again = encode(model, sites, plan, cache=cache)
    assert counting.count == 3
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    damaged = next(tmp_path.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    third = encode(model, sites, plan, cache=cache)
    assert counting.count == 4
    assert all(equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_stays_dense(bad: float) -> None:
    weights = {"a": normal(64, 64), "b": normal(64, 64)}
    sites, plan = plan_for(model_of(weights))
    weights["a"][5, 7] = bad
    found = encode(model_of(weights), sites, plan)
    assert found[0].placement is None
    assert found[0].reason == "holds infinities or NaN"
    assert found[1].placement is not None


def test_a_weight_beyond_the_range_of_the_codec_stays_dense() -> None:
    model = model_of({"a": normal(64, 64) * np.float32(1e30), "b": normal(64, 64)})
    sites, plan = plan_for(model)
    found = encode(model, sites, plan)
    assert found[0].placement is None
    assert "too large" in found[0].reason
    assert found[1].placement is not None


def test_a_weight_that_decodes_to_something_else_stays_dense(
    model: ir.Model, monkeypatch: pytest.MonkeyPatch, counting: Counting
) -> None:
    sites, plan = plan_for(model)
    hyper = Counting._hyper
    wrong = sites[1]

    def decode(site: WeightSite, payload: Any) -> Array:
        values = hyper.decode(site, payload)
        return -values if site == wrong else values

    monkeypatch.setattr(counting, "decode", decode, raising=False)
    found = encode(model, sites, plan)
    assert [item.placement is None for item in found] == [False, True, False]
    assert "has relative error 1.99" in found[1].reason


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (70_000, 9), (2, 600_000)])
def test_the_error_is_the_relative_frobenius_norm(shape: tuple[int, int]) -> None:
    weight, noise = normal(*shape), normal(*shape)
    decoded = weight + np.float32(0.1) * noise
    difference = decoded.astype(np.float64) - weight
    expected = np.linalg.norm(difference) / np.linalg.norm(weight.astype(np.float64))
    assert weight_error(weight, decoded) == pytest.approx(expected, rel=1e-12)


def test_the_error_of_zeros_is_zero_only_for_zeros() -> None:
    zeros = np.zeros((4, 4), np.float32)
    assert weight_error(zeros, zeros) == 0.0
    assert weight_error(zeros, zeros + 1) == np.inf


def test_zeros_are_encoded_without_error() -> None:
    model = model_of({"a": np.zeros((64, 64), np.float32), "b": normal(64, 64)})
    sites, plan = plan_for(model)
    found = encode(model, sites, plan)
    assert found[0].placement is not None
    assert found[0].error == 0.0


def test_integer_arithmetic_is_told_to_the_nodes(model: ir.Model) -> None:
    sites, plan = plan_for(model)
    integer = dataclasses.replace(plan, settings=Settings(precision="int8"))
    for item in encode(model, sites, integer):
        assert item.placement is not None
        assert item.placement.payload.attributes["precision"] == 1


def test_what_is_not_finite_is_found_wherever_it_is() -> None:
    assert not_finite(np.zeros((0, 4), np.float32)) == ""
    assert not_finite(normal(4, 4)) == ""
    for bad in (np.nan, np.inf, -np.inf):
        weight = normal(4, 4)
        weight[3, 3] = bad
        assert not_finite(weight)


@pytest.mark.parametrize("stored", [(130, 300), (300, 130)])
@pytest.mark.parametrize("codec_name", ["hyper", "int"])
def test_errors_of_large_weights_are_measured_in_parts(
    codec_name: str, stored: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of({"w": normal(*stored)})
    canonicalize(model)
    (site,) = find_sites(model, min_size=0).sites
    codec, weight = CODECS[codec_name], read_weight(model, site)
    payload = codec.encode(site, weight, codec.params_type())
    whole = weight_error(weight, codec.decode(site, payload))
    monkeypatch.setattr(encoded, "_WHOLE", 4 * 40 * site.length)
    sizes: list[int] = []
    decode = type(codec).decode
    monkeypatch.setattr(
        type(codec), "decode", lambda *args: (sizes.append(args[1].rows), decode(*args))[1]
    )
    assert encoded.decoding_error(weight, codec, site, payload) == pytest.approx(whole, rel=1e-12)
    assert sum(sizes) == site.rows
    assert (len(sizes) > 1) == (codec.row_parts is not None)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stored", [(130, 300), (300, 130)])
def test_half_precision_is_converted_in_parts(
    dtype: type, stored: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are those of the whole matrix in float32, whichever way it lies in memory."""
    (site,) = find_sites(model_of({"w": normal(*stored)}), min_size=0).sites
    codec, params = CODECS["hyper"], HyperParams(bits=3)
    weight = site.matrix(normal(*stored).astype(dtype))
    single = weight.astype(np.float32)
    whole = codec.encode(site, single, params)
    sizes: list[int] = []
    encode_part = Coder.encode
    monkeypatch.setattr(
        Coder, "encode", lambda own, part: (sizes.append(len(part)), encode_part(own, part))[1]
    )
    monkeypatch.setattr(feedback, "_CONVERTED", 40 * site.length)
    parts = codec.encode(site, weight, params)
    assert len(sizes) > 1 and sum(sizes) == site.rows
    for name, tensor in whole.tensors.items():
        assert np.array_equal(parts.tensors[name], tensor)
    error = weight_error(single, codec.decode(site, whole))
    assert encoded.decoding_error(weight, codec, site, parts) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_is_not_finite_in_half_precision_is_found(dtype: type) -> None:
    largest = np.array([[ml_dtypes.finfo(dtype).max, -0.0], [1e-7, -1.0]]).astype(dtype)
    assert not not_finite(largest)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        weight = largest.copy()
        weight[1, 0] = bad
        assert not_finite(weight) and not_finite(weight.T)
