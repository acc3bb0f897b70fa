"""Costs of this machine, plans that are fast enough, and their measurement."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.cli.app import main
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.prepare import prepare
from onnxcomp.passes.ir.files import read
from onnxcomp.passes.latency import cost_table, measure
from onnxcomp.passes.latency import model as latency_model
from onnxcomp.passes.latency.cost_table import CostTable, cached_costs, costs_path, machine
from onnxcomp.passes.latency.measure import Slowdown
from onnxcomp.passes.latency.model import product_inputs
from onnxcomp.passes.weight import Array, Use, WeightSite

RNG = np.random.default_rng(3)


def weight(rows: int, columns: int) -> Array:
    return RNG.standard_normal((rows, columns)).astype(np.float32) / 16


def site(rows: int = 256, length: int = 512) -> WeightSite:
    use = Use("n", "MatMul", 1, "matmul")
    return WeightSite("w", (length, rows), "float32", (use,), "", rows, length, True)


def table(**coefficients: list[float]) -> CostTable:
    return CostTable(machine(), {key.replace("_", " "): v for key, v in coefficients.items()})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_coefficients_come_back_from_times() -> None:
    wanted = np.array([2e-6, 1e-11, 3e-12, 0.0])
    points = [
        (m, r, k, float(wanted @ cost_table._features(m, r, k)))
        for m in (1, 16, 128)
        for r, k in ((128, 128), (512, 512), (384, 1536), (1024, 1024))
    ]
    found = cost_table._fitted(points)
    for m, r, k, seconds in points:
        assert float(np.dot(found, cost_table._features(m, r, k))) == pytest.approx(
            seconds, rel=0.02
        )
    assert min(found) >= 0.0


def test_added_time_is_that_of_all_products() -> None:
    known = table(dense=[0.0, 0.0, 1e-9, 0.0], hyper_4=[1e-6, 0.0, 0.5e-9, 0.0])
    hyper = CODECS["hyper"]
    each = 3 * 256 * 512
    added = known.added(hyper, HyperParams(4), site(), [1, 2])
    assert added == pytest.approx(2e-6 - 0.5e-9 * each)
    assert known.added(hyper, HyperParams(3), site(), [1, 2]) is None
    assert known.added(hyper, HyperParams(4), site(), []) == 0.0
    low_rank = CODECS["lowrank"]
    params = low_rank.candidates(site())[-1]
    share = low_rank.size(site(), params) / site().nbytes
    assert known.added(low_rank, params, site(), [1]) == pytest.approx(
        1e-9 * 256 * 512 * (share - 1)
    )


def test_measured_costs_are_kept_and_found_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_table, "_EXTENTS", ((64, 64), (128, 64)))
    monkeypatch.setattr(cost_table, "_HEIGHTS", (1, 8))
    monkeypatch.setattr(cost_table, "_SECONDS", 0.0)
    assert cached_costs() is None
    done = CliRunner().invoke(main, ["bench", "--costs", "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert Path(document["path"]) == costs_path() and costs_path().is_relative_to(cache)
    assert {"dense", "hyper 4", "int 8"} <= document["coefficients"].keys()
    found = cached_costs()
    assert found is not None and found.machine == machine()
    assert (found.seconds("hyper 4", 1, 64, 64) or 0.0) > 0.0
    costs_path().write_text("{", encoding="utf-8")
    assert cached_costs() is None
    assert CliRunner().invoke(main, ["bench"]).exit_code == 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two products: one with 64 rows of activations, one with a single row."""
    nodes = [
        helper.make_node("MatMul", ["x", "many"], ["h"], name="first"),
        helper.make_node("ReduceMean", ["h"], ["m"], axes=[0], keepdims=1),
        helper.make_node("MatMul", ["m", "one"], ["y"], name="second"),
    ]
    held = {"many": weight(256, 256), "one": weight(256, 256)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 256])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 256])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "x.npz"
    np.savez(path, x=RNG.standard_normal((64, 256)).astype(np.float32))
    return path


def test_inputs_of_products_are_looked_at(model: Path) -> None:
    prepared = prepare(read(model), Settings())
    x = RNG.standard_normal((64, 256)).astype(np.float32)
    found = product_inputs(prepared.model, prepared.sites, {"x": x})
    assert [[each.rows for each in found[name]] for name in ("many", "one")] == [[64], [1]]
    # What DynamicQuantizeLinear loses of these activations.
    step = (x.max() - x.min()) / 255
    lost = np.rint(x / step) * step - x
    expected = np.linalg.norm(lost) / np.linalg.norm(x)
    assert found["many"][0].rounding == pytest.approx(expected, rel=0.02)
    nothing = product_inputs(prepared.model, prepared.sites, {"x": np.zeros_like(x)})
    assert nothing["many"][0].rounding == 0.0


SLOW = {f"hyper_{bits}": [0.0, 0.0, 3e-9, 0.0] for bits in range(1, 7)}
SLOW |= {f"int_{bits}": [0.0, 0.0, 3e-9, 0.0] for bits in (4, 8)}


def test_a_plan_is_as_fast_as_it_has_to_be(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = table(dense=[0.0, 0.0, 1e-9, 0.0], **SLOW)
    monkeypatch.setattr(latency_model, "cached_costs", lambda: known)
    # 65 rows in all; products on codes are three times as slow as dense ones.
    seconds = 65 * 256 * 256 * 1e-9
    monkeypatch.setattr(latency_model, "_thread_seconds", lambda run, feed: seconds)
    free = oc.plan(model, max_slowdown=5, data=data, method="hyper")
    assert free.slowdown == pytest.approx(3.0, rel=1e-3)
    assert not any(choice.kept for choice in free)
    bound = oc.plan(model, max_slowdown=1.5, data=data, method="hyper")
    assert bound.slowdown is not None and bound.slowdown <= 1.5
    assert bound["many"].kept and not bound["one"].kept
    assert bound["one"].time == pytest.approx(2e-9 * 256 * 256, rel=1e-3)
    assert oc.Plan.loads(bound.dumps()).dumps() == bound.dumps()


def test_the_fastest_form_that_is_no_less_accurate_is_taken(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are slow with many rows and fast with one, and five bits are faster than four."""
    fast = SLOW | {"hyper_4": [0.0, 9e-10, 2e-9, 0.0], "hyper_5": [0.0, 0.0, 9e-10, 0.0]}
    fast |= {"hyper_3": [0.0, 0.0, 1e-12, 0.0]}
    known = table(dense=[0.0, 1e-9, 8e-10, 0.0], **fast)
    monkeypatch.setattr(latency_model, "cached_costs", lambda: known)
    options: dict[str, Any] = {"data": data, "method": "hyper", "bits": 4}
    usual = oc.plan(model, **options)
    assert {choice.params.bits for choice in usual} == {4}
    found = oc.plan(model, objective="latency", **options)
    assert found["many"].kept and "fastest" in found["many"].reason
    assert found["one"].params.bits == 5  # three bits are faster, and less accurate
    assert found.slowdown is not None and found.slowdown < 1.0
    small = oc.plan(model, objective="latency", data=data, method="hyper", ratio=3)
    assert small.met and small.bytes is not None and small.bytes * 3 <= model.stat().st_size


def test_int8_is_taken_where_it_is_faster_and_activations_allow_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic int8 is the fastest form of both products; one has an outlier among its inputs."""
    fast = SLOW | {"dynamic_8": [0.0, 0.0, 0.5e-9, 0.0]}
    known = table(dense=[0.0, 0.0, 1e-9, 0.0], **fast)
    monkeypatch.setattr(latency_model, "cached_costs", lambda: known)
    monkeypatch.setattr(latency_model, "_thread_seconds", lambda run, feed: 65 * 256**2 * 1e-9)
    x = RNG.standard_normal((64, 256)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "far.npz", x=np.where(np.arange(x.size).reshape(x.shape) == 77, 3e3, x))
    for objective in ({"objective": "latency"}, {"max_slowdown": 0.51}):
        plain = oc.plan(model, data=tmp_path / "x.npz", bits=4, **objective)
        assert {choice.codec for choice in plain} == {"dynamic"}
        assert {choice.reason for choice in plain} == {
            "expected to be the fastest form that is no less accurate"
        }
        far = oc.plan(model, data=tmp_path / "far.npz", bits=4, **objective)
        assert far["many"].codec == "dense"
    bound = oc.plan(model, data=tmp_path / "x.npz", bits=4, max_slowdown=1.0)
    assert [bound[name].codec for name in ("many", "one")] == ["dynamic", "hyper"]


def test_costs_of_a_class_of_machines_come_with_the_compiler(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = table(dense=[0.0, 0.0, 1e-11, 0.0], **SLOW)
    monkeypatch.setattr(latency_model, "cached_costs", lambda: known)
    monkeypatch.setenv("ONNXCOMP_ISA", "plain")
    for target, kind in (("avx2", "structured"), ("avx512", "winding")):
        costs = cost_table.committed_costs(target)
        assert costs is not None and costs.machine["isa"] == target
        plan = oc.plan(model, data=data, max_slowdown=1, bits=4, method="hyper", target=target)
        one = plan["one"]
        assert not one.kept and CODECS["hyper"].kind(one.params) == kind
        key = CODECS["hyper"].cost_key(one.params)
        assert key in costs.coefficients
        gained = [costs.seconds(k, 1, 256, 256) for k in (key, "dense")]
        assert one.time == pytest.approx(gained[0] - gained[1], rel=1e-3)
    assert cost_table.committed_costs("neon") is None


def test_time_is_not_measured_for_another_class_of_machines(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_model, "cached_costs", lambda: cost_table.committed_costs("avx2"))
    monkeypatch.setenv("ONNXCOMP_ISA", "avx2")
    options: dict[str, Any] = {"data": data, "method": "hyper", "bits": 4, "verify": False}
    result = oc.optimize(model, tmp_path / "a.onnx", max_slowdown=9, target="avx512", **options)
    assert result.report.speed is None
    result = oc.optimize(model, tmp_path / "b.onnx", max_slowdown=99, target="avx2", **options)
    assert result.report.speed is not None


def test_what_is_measured_decides(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The costs say that products on codes are fast; the measurement says they are not."""
    fast = {key: [0.0, 0.0, 0.9e-9, 0.0] for key in SLOW}
    known = table(dense=[0.0, 0.0, 1e-9, 0.0], **fast)
    monkeypatch.setattr(latency_model, "cached_costs", lambda: known)
    factors = iter([2.0, 0.9])

    def measured(reference: Any, compressed: Any, most: float, *_: Any) -> Slowdown:
        return Slowdown(1.0, next(factors), most)

    monkeypatch.setattr("onnxcomp.passes.driver.gates.measure_slowdown", measured)
    options: dict[str, Any] = {"max_slowdown": 1.0, "data": data, "method": "hyper"}
    result = oc.optimize(model, tmp_path / "out.onnx", verify=False, **options)
    assert result.report.speed is not None and result.report.speed["passed"]
    assert next(factors, None) is None
    factors = iter([2.0] * 9)
    with pytest.raises(oc.RejectedError, match=r"runs 2 times as long, 1 are allowed"):
        oc.optimize(model, tmp_path / "slow.onnx", verify=False, **options)


def test_both_models_are_timed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SECONDS", 0.05)
    small = tmp_path / "small.onnx"
    oc.optimize(model, small, verify=False)
    found = measure.measure_slowdown(model, small, 1000.0, shapes={"x": (8, 256)})
    assert found.passed and found.factor > 0.0
    assert found.to_json()["slowdown"] == pytest.approx(found.factor, abs=1e-3)
