"""Plans that know inputs: what each weight's error does to the outputs, and what that buys."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.cli.app import main
from onnxcomp.cli.plan import plan_verdict
from onnxcomp.cli.plots import scatter
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.perturbation import Probe
from onnxcomp.passes.calibration.sensitivity import (
    Sensitivities,
    block_noise,
    measure_sensitivities,
)
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.moments import output_error
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.prepare import prepare
from onnxcomp.passes.encoding import rehearsal
from onnxcomp.passes.ir.files import read
from onnxcomp.passes.planning import search_space
from onnxcomp.passes.planning.candidates import Estimate
from onnxcomp.passes.planning.error_model import Estimates, gains
from onnxcomp.passes.planning.measurements import blended
from onnxcomp.passes.planning.sensitivity_prior import sensitivity, sensitivity_prior
from onnxcomp.passes.weight import Array, Stats, Use

RNG = np.random.default_rng(5)


def weight(rows: int, columns: int) -> Array:
    return RNG.standard_normal((rows, columns)).astype(np.float32) / 16


def two_paths() -> onnx.ModelProto:
    """``y = x A + 0.01 x B + x C`` with `C` inside an If."""
    tensors = {"a": weight(256, 256), "b": weight(256, 256)}
    inner = helper.make_graph(
        [
            helper.make_node(
                "Constant", [], ["c"], value=numpy_helper.from_array(weight(256, 256))
            ),
            helper.make_node("MatMul", ["x", "c"], ["inner"], name="inside"),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["strong"], name="first"),
        helper.make_node("MatMul", ["x", "b"], ["half"], name="second"),
        helper.make_node("Mul", ["half", "small"], ["weak"]),
        helper.make_node("If", ["yes"], ["third"], then_branch=inner, else_branch=other),
        helper.make_node("Add", ["strong", "weak"], ["both"]),
        helper.make_node("Add", ["both", "third"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    initializers.append(numpy_helper.from_array(np.array(0.01, np.float32), "small"))
    graph = helper.make_graph(
        nodes,
        "paths",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 256]),
            helper.make_tensor_value_info("yes", onnx.TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 256])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(two_paths(), path)
    return path


def feeds(*, yes: bool, count: int = 4) -> list[dict[str, Array]]:
    rows = np.random.default_rng(7).standard_normal((count, 64, 256)).astype(np.float32)
    return [{"x": x, "yes": np.array(yes)} for x in rows]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, feed in enumerate(feeds(yes=True)):
        np.savez(folder / f"{number}.npz", **feed)  # type: ignore[arg-type]
    return folder


def test_a_probe_computes_with_other_weights_also_in_subgraphs(model: Path, tmp_path: Path) -> None:
    prepared = prepare(read(model), Settings())
    by_size = {site.name: site for site in prepared.sites}
    assert len(by_size) == 3
    (inside,) = by_size.keys() - {"a", "b"}
    probe = Probe(prepared.model, prepared.sites, feeds(yes=True), tmp_path)
    assert probe.noise({}) == 0.0
    weights = {name: read_weight(prepared.model, site) for name, site in by_size.items()}
    for name in ("a", inside):
        # Without one of two equal paths half of the power is gone.
        found = probe.noise({by_size[name]: np.zeros_like(weights[name])})
        assert found == pytest.approx(0.5, abs=0.1)


def test_sensitivities_tell_strong_paths_from_weak_ones(model: Path) -> None:
    prepared = prepare(read(model), Settings())
    found = measure_sensitivities(prepared.model, prepared.sites, feeds(yes=True))
    assert found.noise["a"] == pytest.approx(0.5, abs=0.1)
    assert found.noise["b"] == pytest.approx(0.5e-4, rel=0.3)
    assert found.scale["a"] == pytest.approx(0.5, abs=0.1)


def test_what_parts_of_the_inputs_disagree_about_is_chance() -> None:
    usual = {"a": 1.0, "b": 1.0, "c": 1.0}
    true = {"a": 1.0, "b": 4.0, "c": 16.0}
    sure = Sensitivities(true, {}, [true, true])
    assert sure.chance(usual) == 0.0
    assert sure.chance(true) == 1.0  # there is nothing to tell apart
    unsure = Sensitivities(true, {}, [{**true, "a": 4.0}, {**true, "a": 0.25}])
    assert 0.0 < unsure.chance(usual) < 1.0
    opposite = Sensitivities(usual, {}, [true, {name: 1 / v for name, v in true.items()}])
    assert opposite.chance(usual) == 1.0


def test_codes_of_few_bits_count_for_being_shorter(model: Path) -> None:
    site = prepare(read(model), Settings()).sites[0]
    candidates = search_space.candidate_set(
        site, Policy(("hyper",)), sensitivity=0.5, measured=0.5, scale=2.0
    )
    for candidate in candidates.options:
        squared = candidate.error**2
        assert candidates.expected_noise(candidate) == pytest.approx(
            0.5 * squared + 2.0 * squared**2
        )


def test_a_weight_that_the_inputs_do_not_reach_counts_as_usual(model: Path) -> None:
    prepared = prepare(read(model), Settings())
    found = measure_sensitivities(prepared.model, prepared.sites, feeds(yes=False)).noise
    assert found.keys() == {"a", "b"}
    prior = sensitivity_prior(prepared.sites)
    complete = blended(prior, found)
    (inside,) = complete.keys() - {"a", "b"}
    assert complete["b"] < complete[inside] < complete["a"]
    assert blended(prior, {}) == {}
    scale = {site.name: complete[inside] / sensitivity(site) for site in prepared.sites}
    scaled = blended(prior, found, doubt=1.0)
    assert {
        name: scaled[name] / sensitivity(site)
        for name, site in ((site.name, site) for site in prepared.sites)
    } == pytest.approx(scale)


def test_gains_are_those_of_noise_in_blocks() -> None:
    length = 320
    mixing = RNG.standard_normal((length, length)) / 8
    mixing[:, :40] *= 6
    x = RNG.standard_normal((2000, length)) @ mixing
    matrix = weight(200, length) * np.linspace(0.2, 3, length, dtype=np.float32)
    site = prepare(read(two_paths()), Settings()).sites[0]
    stats = Stats(site, len(x), x.T @ x / len(x), x.mean(axis=0))
    found = gains(matrix, stats)
    assert found is not None
    noisy = [block_noise(matrix, np.random.default_rng(seed), 0.1) for seed in range(8)]
    measured = np.mean([output_error(matrix, n, stats.gram) for n in noisy]) / 0.1
    assert found.white == pytest.approx(measured, rel=0.1)
    assert 0.05 < found.feedback < 0.9


def test_estimates_follow_what_calibration_leaves(model: Path) -> None:
    prepared = prepare(read(model), Settings())
    site = next(site for site in prepared.sites if site.name == "a")
    x = RNG.standard_normal((2000, 256)) @ (RNG.standard_normal((256, 256)) / 8)
    stats = Stats(site, len(x), x.T @ x / len(x), x.mean(axis=0))
    matrix, codec, params = read_weight(prepared.model, site), CODECS["hyper"], HyperParams(2)
    found: dict[bool, Estimate] = {}
    for calibrated in (False, True):
        estimates = Estimates(prepared.model, calibrated=calibrated)
        estimates.look_at(stats)
        (found[calibrated],) = estimates(codec, site, [params])
    plain = codec.decode(site, codec.encode(site, matrix, params))
    assert found[False].output_error == pytest.approx(
        output_error(matrix, plain, stats.gram), rel=0.1
    )
    assert codec.calibration is not None
    feedback = codec.calibration.encode(site, matrix, params, stats)
    assert found[True].output_error == pytest.approx(
        output_error(matrix, codec.decode(site, feedback), stats.gram), rel=0.2
    )
    assert (found[True].harm or 1) < (found[False].harm or 0)


def test_feedback_does_not_help_look_ups(model: Path) -> None:
    prepared = prepare(read(model), Settings())
    site = next(site for site in prepared.sites if site.name == "a")
    x = RNG.standard_normal((2000, 256)) @ (RNG.standard_normal((256, 256)) / 8)
    looked_up = Use("rows", "Gather", 0, "gather")
    harms = []
    for own in (site, dataclasses.replace(site, uses=(*site.uses, looked_up))):
        estimates = Estimates(prepared.model, calibrated=True)
        estimates.look_at(Stats(own, len(x), x.T @ x / len(x), x.mean(axis=0)))
        (found,) = estimates(CODECS["hyper"], own, [HyperParams(3)])
        harms.append(found.harm or found.error)
    assert harms[0] < harms[1] < CODECS["hyper"].predict(site, HyperParams(3))


def test_bytes_go_where_the_outputs_need_them(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"target_size": 90_000, "method": "hyper"}
    blind = oc.plan(model, **options)  # type: ignore[arg-type]
    plan = oc.plan(model, data=data, calibration="off", **options)  # type: ignore[arg-type]
    assert blind.error is None
    assert {choice.params.to_json()["bits"] for choice in blind} <= {2, 3}
    assert plan["a"].params.to_json()["bits"] > plan["b"].params.to_json()["bits"] + 1
    assert plan.bytes is not None and plan.bytes <= 90_000
    assert oc.Plan.loads(plan.dumps()).dumps() == plan.dumps()
    errors = []
    for number, made in enumerate((blind, plan)):
        path = tmp_path / f"{number}.onnx"
        oc.apply(model, made, path, verify=False)
        errors.append(oc.verify(model, path, data=data).outputs["y"].rel_l2)
    assert errors[1] < 0.9 * errors[0]
    assert plan.error == pytest.approx(errors[1], rel=0.1)
    assert plan.loss == pytest.approx(errors[1] ** 2, rel=0.2)
    assert plan.loss is not None and 0.0 < (plan.loss_error or 0.0) < plan.loss
    assert plan.to_json()["loss_error"] == pytest.approx(plan.loss_error, rel=1e-3)
    low, high = plan.loss_interval or (0.0, 0.0)
    assert low * high == pytest.approx(plan.loss**2)
    assert low < errors[1] ** 2 < high
    assert f"({low:.3g} to {high:.3g})" in plan_verdict(plan)
    assert "expected loss" not in plan_verdict(blind)
    unsure = dataclasses.replace(plan, loss=0.02, loss_error=0.02)
    assert unsure.loss_interval == pytest.approx((0.02 / 5.287, 0.02 * 5.287), rel=1e-3)
    losses = {entry["plan"]: entry["loss"] for entry in plan.compared}
    assert losses["expected best"] == min(losses.values()) < 0.5 * losses["equal"]
    assert not blind.compared and blind.loss is None and blind.loss_error is None
    assert blind.loss_interval is None


@pytest.mark.parametrize(("small", "chosen"), [(True, True), (False, True), (False, False)])
def test_a_plan_expects_what_calibrated_codes_lose(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool, chosen: bool
) -> None:
    monkeypatch.setattr(rehearsal, "_SMALL", 1 << 21 if small else 0)
    monkeypatch.setattr(rehearsal, "_CHOSEN", 1 << 21 if chosen else 0)
    x = np.random.default_rng(8).standard_normal((16, 64, 256)).astype(np.float32)
    inputs = [{"x": part, "yes": np.array(True)} for part in x]
    path = tmp_path / "out.onnx"
    result = oc.optimize(
        model, path, target_size=70_000, data=inputs, method="hyper", tune=0, verify=False
    )
    measured = oc.verify(model, path, data=feeds(yes=True)).outputs["y"].rel_l2
    assert result.plan.error == pytest.approx(measured, rel=0.15)
    assert result.plan.loss == pytest.approx(measured**2, rel=0.3)


def test_the_smallest_plan_that_keeps_an_error(model: Path, data: Path) -> None:
    sizes = []
    for error in (0.2, 0.1, 0.05):
        plan = oc.plan(model, max_error=error, data=data, method="hyper")
        assert plan.error is not None and 0.7 * error < plan.error <= error
        assert plan.bytes is not None
        sizes.append(plan.bytes)
    assert sizes == sorted(sizes)
    made_up = oc.plan(model, max_error=0.1, method="hyper")
    assert made_up.error is not None and 0.05 < made_up.error <= 0.1


def test_a_frontier_falls_and_is_nowhere_worse_than_equal_settings(model: Path, data: Path) -> None:
    points = oc.frontier(model, data=data, method="hyper")
    mixed = [(p.bytes, p.error or 0.0) for p in points if not p.setting]
    assert len(mixed) > 8
    assert [error for _, error in mixed] == sorted((e for _, e in mixed), reverse=True)
    equal = [p for p in points if p.setting]
    assert {p.setting for p in equal} >= {f"hyper bits={bits}" for bits in range(2, 7)}
    for point in equal:
        plan = oc.plan(model, target_size=point.bytes, data=data, method="hyper")
        assert plan.error is not None and point.error is not None
        assert plan.error <= 1.15 * point.error
        measured = {entry["plan"]: entry["loss"] for entry in plan.compared}
        assert plan.loss == pytest.approx(plan.compared[0]["loss"], rel=1e-3)
        assert plan.compared[0]["loss"] <= measured.get("equal", np.inf)


def test_the_frontier_is_drawn_and_printed(model: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(model), "--frontier"], prog_name="onnxcomp")
    assert result.exit_code == 0
    assert result.stdout.count("*") > 8
    assert "hyper bits=4" in result.stdout
    machine = CliRunner().invoke(main, ["plan", str(model), "--frontier", "--json"])
    points = json.loads(machine.stdout)["frontier"]
    assert {"setting", "bytes", "ratio", "error", "weight_error"} == points[0].keys()


def test_a_picture_has_its_ends_where_the_points_are() -> None:
    lines = scatter([(1, 1, "*"), (100, 0.01, "o")], width=11, height=3, labels=("a", "b"))
    assert lines[0] == "100 % |*"
    assert lines[2] == "  1 % |          o"
    assert lines[-1].split() == ["a", "b"]
    assert scatter([(1, 1, "*")]) == []
