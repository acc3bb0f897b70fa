"""Bases that several weights share: found for all of them, stored once, in standard operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.lowrank.shared_basis import SharedBasisCodec, SharedBasisParams
from onnxcomp.passes.weight import WeightSite

Array = npt.NDArray[Any]
SiteMaker = Callable[..., WeightSite]
CODEC = SharedBasisCodec()
WIDTH = 64
ROWS = {"q": 64, "k": 32, "v": 32, "o": 64}


def test_a_basis_is_the_best_one_for_all_weights(make_site: SiteMaker) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((rows, 40)).astype(np.float32) for rows in (24, 16, 32)]
    sums = CODEC.bases.sums(40)
    for weight in weights:
        sums.add(weight)
    bound = CODEC.bases.bound(sums.basis(12))
    lost = 0.0
    for weight in weights:
        site = make_site(len(weight), 40)
        decoded = bound.decode(site, bound.encode(site, weight, SharedBasisParams(12, "all")))
        lost += float(np.square(decoded - weight).sum())
    values = np.linalg.svd(np.concatenate(weights), compute_uv=False)
    assert lost == pytest.approx(float(np.square(values[12:]).sum()), rel=1e-4)


def test_settings_out_of_range_are_refused(make_site: SiteMaker) -> None:
    with pytest.raises(UsageError, match="rank=0"):
        CODEC.check(SharedBasisParams(0))
    weight = np.ones((40, 24), np.float32)
    with pytest.raises(UsageError, match="rank=24"):
        CODEC.encode(make_site(40, 24), weight, SharedBasisParams(24))
    assert CODEC.refuse(make_site(64, 64, need="gather")) == "no product reads it"


def attention(path: Path, layers: int = 2) -> Path:
    """Layers of products with q, k and v of one input and o of what these give."""
    rng, nodes, fixed, x = np.random.default_rng(0), [], [], "x"
    common = rng.standard_normal((WIDTH, 12))
    for layer in range(layers):
        for name, rows in ROWS.items():
            weight = common @ rng.standard_normal((12, rows)) / 60
            weight += rng.standard_normal((WIDTH, rows)) / 60
            fixed.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}{layer}"))
        nodes += [
            helper.make_node("MatMul", [x, f"{name}{layer}"], [f"{name}y{layer}"]) for name in "qkv"
        ]
        nodes += [
            helper.make_node("Concat", [f"ky{layer}", f"vy{layer}"], [f"kv{layer}"], axis=-1),
            helper.make_node("Tanh", [f"kv{layer}"], [f"t{layer}"]),
            helper.make_node("Mul", [f"qy{layer}", f"t{layer}"], [f"a{layer}"]),
            helper.make_node("MatMul", [f"a{layer}", f"o{layer}"], [f"d{layer}"]),
            helper.make_node("Add", [x, f"d{layer}"], [f"x{layer}"]),
        ]
        x = f"x{layer}"
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])
    made = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", WIDTH])
    graph = helper.make_graph(nodes, "g", [given], [made], fixed)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def stored(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def run(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(path)  # no library: operators are standard ones
    return np.asarray(session.run(None, {"x": x})[0])


def inputs(count: int = 40) -> Array:
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((WIDTH, WIDTH)) * np.geomspace(3.0, 0.1, WIDTH)
    return (rng.standard_normal((count, WIDTH)) @ mixing / 8).astype(np.float32)


@pytest.mark.parametrize("data", [False, True], ids=["values", "data"])
def test_weights_of_one_input_share_a_basis(tmp_path: Path, data: bool) -> None:
    dense, small = attention(tmp_path / "m.onnx"), tmp_path / "s.onnx"
    options: dict[str, Any] = {"data": {"x": inputs(4000)}} if data else {}
    result = onnxcomp.optimize(
        dense, small, method="shared_basis", set_=".*:rank=16", min_size=1, **options
    )
    found, x = stored(small), inputs()
    bases = {name: array.shape for name, array in found.items() if "::basis." in name}
    assert len(bases) == 4  # one for q, k and v, and one for o, in each of two layers
    assert set(bases.values()) == {(WIDTH, 16)}
    for layer in range(2):
        assert f"com.onnxcomp::basis.q{layer}.{WIDTH}x16" in bases
        assert all(found[f"{n}{layer}::up"].shape == (16, ROWS[n]) for n in ROWS)
    assert not any(node.domain for node in onnx.load(small).graph.node)
    assert result.plan.bytes == result.report.output.bytes == small.stat().st_size
    error = np.linalg.norm(run(small, x) - run(dense, x)) / np.linalg.norm(run(dense, x))
    assert error < (0.15 if data else 0.3)
    again = tmp_path / "again.onnx"
    onnxcomp.optimize(dense, again, method="shared_basis", set_=".*:rank=16", min_size=1, **options)
    assert again.read_bytes() == small.read_bytes()


def test_a_rule_names_a_basis_for_weights_of_several_layers(tmp_path: Path) -> None:
    dense, small = attention(tmp_path / "m.onnx"), tmp_path / "s.onnx"
    rule = "^[qkv]:method=shared_basis,rank=24,basis=both"
    onnxcomp.optimize(dense, small, method="dense", set_=rule, min_size=1)
    found = stored(small)
    assert [name for name in found if "::basis." in name] == [
        f"com.onnxcomp::basis.both.{WIDTH}x24"
    ]
    x = inputs()
    expanded = tmp_path / "d.onnx"
    onnxcomp.expand(small, expanded)
    np.testing.assert_allclose(run(expanded, x), run(small, x), rtol=1e-3, atol=1e-4)
    assert set(stored(expanded)) == set(stored(dense))
    described = {weight.name: weight for weight in onnxcomp.inspect(small).compressed}
    assert set(described) == {f"{name}{layer}" for name in "qkv" for layer in range(2)}
    assert described["q0"].codec == "shared_basis"
    assert described["q0"].params == {"rank": 24, "basis": "both"}


def test_products_with_a_basis_are_computed_once(tmp_path: Path) -> None:
    dense, small = attention(tmp_path / "m.onnx"), tmp_path / "s.onnx"
    onnxcomp.optimize(dense, small, method="shared_basis", set_=".*:rank=16", min_size=1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(small, options)
    nodes = onnx.load(tmp_path / "seen.onnx").graph.node
    with_bases = [n for n in nodes if "::basis." in "".join(n.input)]
    assert len(with_bases) == 2 * 2  # for q, k and v, and for o


def test_a_plan_gives_a_family_one_rank(tmp_path: Path) -> None:
    dense, small = attention(tmp_path / "m.onnx", 3), tmp_path / "s.onnx"
    result = onnxcomp.optimize(
        dense, small, method="shared_basis", ratio=1.8, min_size=1, data={"x": inputs(4000)}
    )
    assert small.stat().st_size <= dense.stat().st_size / 1.8
    for layer in range(3):
        choices = [result.plan[f"{name}{layer}"] for name in "qkv"]
        assert len({choice.params for choice in choices}) == 1
        assert len({choice.bytes for choice in choices}) == 1
    x = inputs()
    assert np.linalg.norm(run(small, x) - run(dense, x)) < 0.2 * np.linalg.norm(run(dense, x))
