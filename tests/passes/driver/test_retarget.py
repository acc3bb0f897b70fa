"""Codes for a class of machines: chosen by `optimize`, changed by `retarget`, named by others."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp import errors
from onnxcomp.ops import library_path
from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.runtime.machine import target_of

SHAPES = {"table": (64, 96), "v": (96, 128), "w": (128, 80)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A look-up and two products."""
    rng = np.random.default_rng(5)
    graph = onnx.parser.parse_graph(
        "g (int64[4] ids) => (float y) {"
        " x = Gather (table, ids) a = MatMul (x, v) r = Relu (a) y = MatMul (r, w) }"
    )
    graph.output[0].type.tensor_type.ClearField("shape")
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape).astype(np.float32) / 10
        graph.initializer.append(numpy_helper.from_array(values, name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path_factory.mktemp("retarget") / "dense.onnx"
    onnx.save(model, path)
    return path


def optimized(dense: Path, target: str, **options: object) -> Path:
    path = dense.with_name(f"{target}-{len(options)}.onnx")
    settings = {"method": "hyper", "bits": 4, "min_size": 1024, "verify": False}
    oc.optimize(dense, path, target=target, **settings | options)
    return path


def kinds(path: Path) -> dict[str, str]:
    return {weight.name: weight.kind for weight in oc.inspect(path).compressed}


def test_products_get_the_codes_of_the_target_and_look_ups_the_better_ones(dense: Path) -> None:
    wanted = {"table": "winding", "v": "structured", "w": "structured"}
    assert kinds(optimized(dense, "avx2")) == kinds(optimized(dense, "neon")) == wanted
    for target in ("any", "avx512", "cuda"):
        assert set(kinds(optimized(dense, target)).values()) == {"winding"}


def test_what_is_asked_for_by_rule_wins_over_the_target(dense: Path) -> None:
    for rule in (".*:table=winding", ".*:state_bits=12", ".*:quality=best"):
        assert set(kinds(optimized(dense, "avx2", set_=rule)).values()) == {"winding"}
    assert "structured" in kinds(optimized(dense, "any", set_=".*:table=structured")).values()


def test_retargeted_files_are_those_that_optimize_would_write(dense: Path, tmp_path: Path) -> None:
    usual, narrow = optimized(dense, "any"), optimized(dense, "avx2")
    there, back = tmp_path / "there.onnx", tmp_path / "back.onnx"
    found = oc.retarget(usual, there, target="avx2", original=dense)
    assert there.read_bytes() == narrow.read_bytes()
    assert found.kept == ("table",)
    assert [weight.name for weight in found.recoded] == ["v", "w"]
    for weight in found.recoded:
        assert weight.error_before is not None and weight.error_before < weight.error < 0.1
    oc.retarget(there, back, original=dense)
    assert back.read_bytes() == usual.read_bytes()


def test_without_the_original_the_errors_add_up(dense: Path, tmp_path: Path) -> None:
    usual, path = optimized(dense, "any"), tmp_path / "new.onnx"
    found = oc.retarget(usual, path, target="avx2")
    assert all(weight.error_before is None for weight in found.recoded)
    oc.verify(dense, path).raise_if_failed()
    before, after = (read_manifest(oc.load(p))["table"].recipe for p in (usual, path))
    assert before == after


def test_nothing_is_encoded_that_suits_the_target(dense: Path, tmp_path: Path) -> None:
    found = oc.retarget(optimized(dense, "avx2"), tmp_path / "same.onnx", target="neon")
    assert not found.recoded and set(found.kept) == set(SHAPES)


def test_odd_calls_are_usage_errors(dense: Path, tmp_path: Path) -> None:
    usual = optimized(dense, "any")
    with pytest.raises(errors.UsageError, match="no compressed weights"):
        oc.retarget(dense, tmp_path / "new.onnx")
    with pytest.raises(errors.UsageError, match="target 'sse' is unknown"):
        oc.retarget(usual, tmp_path / "new.onnx", target="sse")
    with pytest.raises(errors.UsageError):
        oc.retarget(usual, usual, target="avx2")


def test_a_foreign_original_is_refused(dense: Path, tmp_path: Path) -> None:
    model = onnx.load(dense)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((96, 64), "f"), "v"))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(errors.ModelError, match="'v' does not match"):
        oc.retarget(optimized(dense, "any"), tmp_path / "n.onnx", original=tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("isa", "target"),
    [("avx512", "avx512"), ("avx2vnni", "avx2"), ("avx2", "avx2"), ("neondot", "neon")],
)
def test_forms_of_kernels_belong_to_targets(isa: str, target: str) -> None:
    assert target_of(isa) == target
    assert target_of("plain") is None


def test_the_doctor_names_codes_that_another_machine_likes_more(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        library_path()
    except errors.RuntimeMissingError as error:
        pytest.skip(f"the operator library is not built: {error}")
    usual, narrow = optimized(dense, "any"), optimized(dense, "avx2")
    monkeypatch.setenv("ONNXCOMP_ISA", "avx2")
    findings = {f.name: f for f in oc.doctor(usual).findings}
    assert findings["codes"].status == "note"
    assert findings["codes"].facts["better"] == ["v", "w"]
    assert f"retarget {usual} --target avx2" in findings["codes"].hint
    assert {f.name: f for f in oc.doctor(narrow).findings}["codes"].status == "ok"
