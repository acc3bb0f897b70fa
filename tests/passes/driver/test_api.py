"""Whole runs on a small model: plans kept to the byte, files, refusals and reports."""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.errors import BudgetError, ModelError, RuntimeMissingError, UsageError, VerifyError
from onnxcomp.passes.ir import validate
from onnxcomp.passes.ir.files import rejected_path
from onnxcomp.passes.weight import Array

SCHEMA = json.loads(
    (Path(__file__).parents[3] / "docs" / "result.schema.json").read_text(encoding="utf-8")
)


def weight(*shape: int) -> Array:
    return np.random.default_rng([*shape]).standard_normal(shape).astype(np.float32) / 8


def small_model() -> onnx.ModelProto:
    """A table, two products and a projection: 300 KB of weights, and a bias."""
    weights = {
        "table": weight(512, 64),
        "up": weight(64, 256),
        "down": weight(32, 256),
        "head": weight(32, 500),
        "bias": weight(32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="look_up"),
        helper.make_node("MatMul", ["e", "up"], ["u"], name="rise"),
        helper.make_node("Relu", ["u"], ["r"], name="bend"),
        helper.make_node("Gemm", ["r", "down", "bias"], ["d"], name="fall", transB=1),
        helper.make_node("MatMul", ["d", "head"], ["scores"], name="judge"),
    ]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    scores = helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 500])
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "small", [ids], [scores], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(small_model(), path)
    return path


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def outputs(path: Path) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"ids": np.arange(0, 512, 7)})
    found: Array = scores
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 2},
        {"bits": 6, "mode": "folded"},
        {"bits": 3, "mode": "decode"},
        {"ratio": 5},
        {"target_size": "60KB"},
        {"ratio": 6, "external_data": "always"},
        {"precision": "int8", "portable": False},
        {"method": "dense", "min_size": 0},
        {"set_": "table:bits=2,state_bits=10"},
        {"include": "up|down"},
        {"exclude": ["judge"]},
    ],
    ids=str,
)
def test_the_output_has_the_planned_bytes(
    model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    planned = oc.plan(model, **settings)
    result = oc.optimize(model, tmp_path / "out.onnx", verify=False, **settings)
    written = sum(Path(file).stat().st_size for file in result.report.output.files)
    assert written == result.report.output.bytes == result.plan.bytes == planned.bytes
    for site in result.report.sites:
        chosen = result.plan.choices.get(site.name)
        assert site.bytes_after == (chosen.bytes if chosen else site.bytes_before)


@pytest.mark.parametrize("ratio", [4.5, 5, 6, 8])
def test_a_ratio_is_met_from_just_below(model: Path, tmp_path: Path, ratio: float) -> None:
    result = oc.optimize(model, tmp_path / "out.onnx", ratio=ratio, verify=False)
    target = result.report.input.bytes / ratio
    assert 0.98 * target < result.report.output.bytes <= target
    assert result.report.target == {"bytes": int(target), "met": True}
    assert result.plan.met


def test_a_saved_plan_is_replayed_byte_for_byte(model: Path, tmp_path: Path) -> None:
    first = oc.optimize(model, tmp_path / "one.onnx", ratio=6, verify=False, jobs=1)
    plan = tmp_path / "plan.json"
    first.plan.save(plan)
    second = oc.apply(model, plan, tmp_path / "two.onnx", verify=False, jobs=3)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert second.plan.dumps() == first.plan.dumps()


def test_an_edited_plan_is_carried_out(model: Path, tmp_path: Path) -> None:
    plan = oc.plan(model, bits=4)
    plan["up"] = plan["up"].with_(bits=2)
    plan["head"] = plan["head"].with_(codec="dense")
    result = oc.apply(model, plan, tmp_path / "out.onnx", verify=False)
    sites = {site.name: site for site in result.report.sites}
    assert sites["up"].params["bits"] == 2
    assert sites["up"].weight_error == pytest.approx(0.27, rel=0.1)
    assert (sites["head"].method, sites["head"].reason) == ("dense", "set in the plan")
    assert result.report.output.bytes == result.plan.bytes


def test_a_plan_and_a_target_exclude_each_other(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plan and a target"):
        oc.optimize(model, tmp_path / "out.onnx", plan=oc.plan(model), bits=3)
    with pytest.raises(UsageError, match="a plan and sparsity were given together"):
        oc.optimize(model, tmp_path / "out.onnx", plan=oc.plan(model), sparsity=0.5)
    same = {"min_size": 64, "plan": oc.plan(model, min_size=64)}
    assert oc.optimize(model, tmp_path / "out.onnx", verify=False, **same).path.exists()


def test_models_in_memory_give_the_same_bytes_and_stay_as_they_are(
    model: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "expected.onnx"
    oc.optimize(model, expected, verify=False)
    proto = onnx.load(model)
    before = proto.SerializeToString()
    for index, source in enumerate([proto, oc.load(model), str(model)]):
        path = tmp_path / f"{index}.onnx"
        result = oc.optimize(source, path, verify=False)
        assert path.read_bytes() == expected.read_bytes()
        assert result.report.input.bytes == pytest.approx(model.stat().st_size, abs=2048)
    assert proto.SerializeToString() == before


def test_a_model_in_memory_is_verified(tmp_path: Path) -> None:
    result = oc.optimize(small_model(), tmp_path / "reference.onnx")
    assert result.verify is not None and result.verify.passed
    assert result.report.input.path is None
    assert [path.name for path in tmp_path.iterdir()] == ["reference.onnx"]


def test_the_result_of_a_run_fits_the_schema(model: Path, tmp_path: Path) -> None:
    result = oc.optimize(model, tmp_path / "out.onnx", bits=4, external_data="always")
    report = result.report
    jsonschema.validate(report.to_json(), SCHEMA)
    assert result.path == tmp_path / "out.onnx"
    assert report.output.files == (str(tmp_path / "out.onnx"), str(tmp_path / "out.onnx.data"))
    assert report.coverage == 1.0
    assert report.verify is not None and report.verify["passed"]
    assert report.verify["outputs"]["scores"]["rel_l2"] < 0.3
    assert report.config["bits"] == 4
    assert {"load", "plan", "encode", "write", "verify", "total"} == report.seconds.keys()
    modes = {site.name: (site.method, site.mode) for site in report.sites}
    assert modes["table"] == modes["up"] == modes["down"] == ("hyper", "fused")
    (bias,) = [site for site in report.sites if site.name == "bias"]
    assert bias.method == "dense"
    assert bias.reason


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = oc.optimize(model, tmp_path / "out.onnx", ratio=6, dry_run=True)
    assert result.path is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    jsonschema.validate(result.report.to_json(), SCHEMA)
    done = oc.optimize(model, tmp_path / "out.onnx", ratio=6, verify=False)
    assert result.report.output.bytes == done.report.output.bytes
    assert result.plan.dumps() == done.plan.dumps()


def test_the_method_dense_leaves_weights_under_their_names(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    result = oc.optimize(model, path, method="dense", min_size=0, verify=False)
    assert np.array_equal(outputs(path), outputs(model))
    assert result.report.coverage == 0.0
    before, after = (
        {tensor.name: tensor.raw_data for tensor in onnx.load(file).graph.initializer}
        for file in (model, path)
    )
    assert {"table", "up", "down", "head"} <= after.keys()
    assert all(before[name] == data for name, data in after.items() if name in before)
    assert {result.plan[name].reason for name in ("table", "up")} == {"as it is, as asked for"}


def test_expansion_gives_a_plain_model_that_computes_the_same(model: Path, tmp_path: Path) -> None:
    small, dense = tmp_path / "small.onnx", tmp_path / "dense.onnx"
    oc.optimize(model, small, verify=False)
    saved = oc.expand(small, dense)
    assert saved.files == (dense,)
    assert saved.bytes == dense.stat().st_size
    assert np.allclose(outputs(dense), outputs(small), atol=1e-5)
    assert {node.domain for node in onnx.load(dense).graph.node} == {""}
    with pytest.raises(UsageError, match="is the input"):
        oc.expand(small, small)


def test_an_impossible_target_gives_the_smallest_output_and_exit_code_3(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out.onnx"
    with pytest.raises(oc.TargetMissedError, match="10000 were asked for") as caught:
        oc.optimize(model, path, target_size=10_000, verify=False)
    result = caught.value.result
    assert isinstance(caught.value, BudgetError)
    assert caught.value.exit_code == 3
    assert path.stat().st_size == result.report.output.bytes == result.plan.bytes
    assert result.report.target == {"bytes": 10_000, "met": False}
    assert not result.plan.met
    assert not oc.plan(model, target_size=10_000).met
    assert path.stat().st_size == oc.plan(model, target_size=path.stat().st_size).bytes


@pytest.mark.parametrize("external_data", ["never", "always"])
def test_a_model_that_fails_verification_is_kept_under_another_name(
    model: Path, tmp_path: Path, external_data: Any
) -> None:
    path = tmp_path / "out.onnx"
    options: dict[str, Any] = {"bits": 1, "tolerance": 1e-6, "external_data": external_data}
    with pytest.raises(oc.RejectedError, match=r"kept as .*out\.rejected\.onnx") as caught:
        oc.optimize(model, path, **options)
    assert isinstance(caught.value, VerifyError)
    assert caught.value.exit_code == 4
    rejected = caught.value.result.path
    assert rejected == rejected_path(path)
    assert not path.exists()
    assert outputs(rejected).shape == (74, 500)
    forced = oc.optimize(model, path, force=True, **options)
    assert forced.path == path and path.exists()
    assert forced.verify is not None and not forced.verify.passed


def test_the_input_is_never_the_output(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    (tmp_path / "link.onnx").symlink_to(model)
    for output in (model, tmp_path / "." / "model.onnx", tmp_path / "link.onnx"):
        with pytest.raises(UsageError, match="is the input"):
            oc.optimize(model, output, verify=False)
    assert model.read_bytes() == before


def test_the_data_of_the_input_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small_model(), path, save_as_external_data=True, location="out.onnx.data")
    with pytest.raises(UsageError, match="is the input"):
        oc.optimize(path, tmp_path / "out.onnx", verify=False)
    planned = oc.plan(path, bits=4)
    assert planned.source.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "no method offers 7 bits"),
        ({"bits": 4, "ratio": 8}, "given together"),
        ({"method": "hypr"}, "method 'hypr' is unknown"),
        ({"set_": "a:bits=3=4"}, "bits is '3=4'"),
        ({"set_": "up:bit=3"}, "no parameter 'bit'"),
        ({"include": "("}, "not a regular expression"),
        ({"jobs": 0}, "jobs is 0"),
        ({"output": None}, "no output"),
        ({"output": "missing/out.onnx"}, "does not exist"),
    ],
    ids=str,
)
def test_mistakes_are_usage_errors_before_any_work(
    model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    output = options.pop("output", "out.onnx")
    path = None if output is None else tmp_path / output
    if "set_" in options and options["set_"].startswith("a:"):
        options["set_"] = options["set_"].replace("a:", "up:")
    with pytest.raises(UsageError, match=re.escape(message)):
        oc.optimize(model, path, verify=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_is_no_model_is_a_model_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError):
        oc.plan(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError):
        oc.plan(path)


def test_an_interrupted_run_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, site: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oc.optimize(model, tmp_path / "out.onnx", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("lacking", [0, 1])
def test_the_disk_is_looked_at_before_anything_is_encoded(
    lacking: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = (oc.plan(model).bytes or 0) - lacking
    usage = type(shutil.disk_usage(tmp_path))(2 * free, free, free)
    monkeypatch.setattr("onnxcomp.passes.driver.emit.shutil.disk_usage", lambda _: usage)
    told: list[str] = []
    run = functools.partial(
        oc.optimize, model, tmp_path / "out.onnx", verify=False,
        progress=lambda done, total, site: told.append(site),
    )  # fmt: skip
    if lacking:
        with pytest.raises(UsageError, match=r"take .* MB, and .* MB of the disk are free"):
            run()
    else:
        run()
    assert bool(told) == (not lacking)


def test_a_second_run_takes_its_payloads_from_the_cache(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = oc.optimize(model, tmp_path / "one.onnx", verify=False, cache=folder)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(stamps) == 4
    second = oc.optimize(model, tmp_path / "two.onnx", verify=False, cache=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert first.report.output.sha256 == second.report.output.sha256


def test_a_model_too_small_to_gain_is_left_alone(tmp_path: Path) -> None:
    proto = small_model()
    del proto.graph.node[1:]
    del proto.graph.initializer[1:]
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight(16, 32), "table"))
    proto.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, ["n", 32])
    )
    result = oc.optimize(proto, tmp_path / "out.onnx", min_size=0, verify=False)
    (site,) = result.report.sites
    assert site.method == "dense"
    assert "outweigh" in site.reason
    assert result.report.output.bytes <= result.report.input.bytes + 64


def test_kernels_that_do_not_run_here_are_refused_at_the_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXCOMP_ISA", "mmx")
    monkeypatch.setattr(validate, "library_path", lambda: tmp_path)  # it is not read
    monkeypatch.setattr(validate, "can_run", lambda isa: isa != "mmx")
    before = sorted(tmp_path.iterdir())

    def progress(*_: object) -> None:
        raise AssertionError("weights are encoded")

    with pytest.raises(RuntimeMissingError, match="ONNXCOMP_ISA is 'mmx'") as caught:
        oc.optimize(model, tmp_path / "out.onnx", bits=4, progress=progress)
    assert "unset ONNXCOMP_ISA" in caught.value.hint
    assert sorted(tmp_path.iterdir()) == before
    # Nothing runs, so it does not matter.
    assert oc.optimize(model, tmp_path / "out.onnx", bits=4, verify=False).path.exists()
