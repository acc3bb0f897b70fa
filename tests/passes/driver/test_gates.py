"""Gates: errors, scores, and what happens to the weights that are to blame."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.cli.app import main
from onnxcomp.errors import UsageError
from onnxcomp.passes.verification.bisect import blame
from onnxcomp.passes.verification.user_metric import load_function
from onnxcomp.passes.weight import Array, Use, WeightSite

RNG = np.random.default_rng(11)
SCHEMA = json.loads(
    (Path(__file__).parents[3] / "docs" / "result.schema.json").read_text(encoding="utf-8")
)


def weight(rows: int, columns: int) -> Array:
    return RNG.standard_normal((rows, columns)).astype(np.float32) / 16


def fragile_model() -> onnx.ModelProto:
    """``y = x A + x B + 20 (x F - x F')``: `F'` is nearly `F`, so errors of `F` count 20 times."""
    fragile = weight(256, 64)
    tensors = {
        "a": weight(256, 64),
        "b": weight(256, 64),
        "fragile": fragile,
        "twin": fragile + 1e-4 * weight(256, 64),
        "twenty": np.array(20, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", name], [f"of_{name}"], name=f"times_{name}")
        for name in ("a", "b", "fragile", "twin")
    ]
    nodes += [
        helper.make_node("Sub", ["of_fragile", "of_twin"], ["little"]),
        helper.make_node("Mul", ["little", "twenty"], ["much"]),
        helper.make_node("Add", ["of_a", "of_b"], ["sum"]),
        helper.make_node("Add", ["sum", "much"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 256])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 64])
    held = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "fragile", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(fragile_model(), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "x.npz"
    np.savez(path, x=RNG.standard_normal((64, 256)).astype(np.float32))
    return path


# The twin stays as it is; products are exact, so that weights alone make errors.
OPTIONS: dict[str, Any] = {"exclude": "twin", "precision": "exact", "method": "hyper"}


def test_the_fragile_weight_is_rolled_back(model: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    plain = oc.optimize(model, path, bits=4, data=data, **OPTIONS)
    assert plain.verify is not None and plain.verify.outputs["y"].rel_l2 > 0.5
    result = oc.optimize(model, path, bits=4, data=data, max_error=0.1, **OPTIONS)
    assert result.verify is not None and result.verify.outputs["y"].rel_l2 <= 0.1
    reasons = {site.name: site.reason for site in result.report.sites}
    assert reasons["fragile"].startswith("rolled back: outputs differed by ")
    assert reasons["a"] == reasons["b"] == "4 bits for all weights"
    jsonschema.validate(result.report.to_json(), SCHEMA)
    again = oc.apply(model, result.plan, tmp_path / "again.onnx", data=data)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    assert again.plan["fragile"].kept


def test_a_given_plan_is_mended_as_well(model: Path, data: Path, tmp_path: Path) -> None:
    plan = oc.plan(model, bits=4, **OPTIONS)
    result = oc.apply(model, plan, tmp_path / "out.onnx", data=data, tolerance=0.1)
    assert {choice.site for choice in result.plan if choice.kept} == {"fragile"}
    assert result.plan.bytes == result.report.output.bytes


def test_the_rest_of_the_budget_is_planned_anew(model: Path, data: Path, tmp_path: Path) -> None:
    """Blind plans give equal bits; with the fragile weight dense, the others get fewer."""
    target = 160_000
    options = {**OPTIONS, "target_size": target}
    blind = oc.plan(model, **options)
    bits = {choice.params.to_json()["bits"] for choice in blind if not choice.kept}
    result = oc.optimize(model, tmp_path / "out.onnx", shapes={"x": (64, 256)}, tolerance=0.2,
                         **options)  # fmt: skip
    assert result.plan["fragile"].kept
    assert result.plan["a"].params.to_json()["bits"] < max(bits)
    assert result.report.output.bytes <= target


def test_an_error_is_kept_by_a_larger_plan(model: Path, data: Path, tmp_path: Path) -> None:
    sizes = []
    for error in (0.3, 0.05):
        result = oc.optimize(model, tmp_path / "out.onnx", max_error=error, data=data, **OPTIONS)
        assert result.verify is not None and result.verify.outputs["y"].rel_l2 <= error
        sizes.append(result.report.output.bytes)
    assert sizes[0] < sizes[1]


def test_an_error_that_cannot_be_kept_is_a_rejection(model: Path, tmp_path: Path) -> None:
    with pytest.raises(oc.RejectedError, match=r"relative difference .* > 1e-06"):
        oc.optimize(model, tmp_path / "out.onnx", bits=2, tolerance=1e-6, **OPTIONS)
    assert (tmp_path / "out.rejected.onnx").exists()


def test_a_finished_model_is_mended(model: Path, data: Path, tmp_path: Path) -> None:
    small, fixed = tmp_path / "small.onnx", tmp_path / "fixed.onnx"
    oc.optimize(model, small, bits=4, **OPTIONS)
    words = ["verify", str(model), str(small), "--data", str(data), "--tolerance", "0.1", "--json"]
    assert CliRunner().invoke(main, words).exit_code == 4
    done = CliRunner().invoke(main, [*words, "--bisect", "-o", str(fixed)])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["bisect"]["blamed"] == ["fragile"]
    assert document["bisect"]["bytes"] == fixed.stat().st_size
    assert oc.verify(model, fixed, data=data, tolerance=0.1).passed
    before, after = ({t.name for t in onnx.load(p).graph.initializer} for p in (small, fixed))
    assert "fragile" in after - before
    assert {name for name in before if name.startswith("a/")} <= after
    nothing = oc.mend(model, fixed, tolerance=0.1, data=data)
    assert nothing.blamed == () and nothing.path is None
    with pytest.raises(UsageError, match="no compressed weights"):
        oc.mend(small, model, tolerance=0.1)
    with pytest.raises(UsageError, match="is the input"):
        oc.mend(model, small, model, tolerance=0.1, data=data)


def test_whole_numbers_that_differ_are_a_rejection(model: Path, tmp_path: Path) -> None:
    """They are judged by the floats that they were decided on, and bisection looks at these."""
    proto = onnx.load(model)
    proto.graph.node.append(helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0))
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("best", onnx.TensorProto.INT64, ["n"]))
    with pytest.raises(oc.RejectedError, match="before a decision"):
        oc.optimize(proto, tmp_path / "out.onnx", bits=1, tolerance=0.01, **OPTIONS)


SCRIPT = """
import numpy as np

X = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
EXACT = {}

def closeness(open_session):
    (y,) = open_session().run(None, {"x": X})
    exact = EXACT.setdefault("y", y)
    return 1 - float(np.linalg.norm(y - exact) / np.linalg.norm(exact))

def broken(open_session):
    raise RuntimeError("no")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_a_score_decides_on_the_command_line(model: Path, script: Path, tmp_path: Path) -> None:
    command = [
        *("optimize", str(model), "-o", str(tmp_path / "out.onnx"), "--bits", "4", "--json"),
        *("--exclude", "twin", "--precision", "exact", "-m", "hyper"),
        *("--eval", f"{script}:closeness", "--max-drop"),
    ]
    done = CliRunner().invoke(main, [*command, "0.15"])
    assert done.exit_code == 0
    scores = json.loads(done.stdout)["evaluation"]
    assert scores["dense"] == 1.0
    assert scores["passed"] and 0.85 <= scores["compressed"] < 1.0
    kept = {s["name"] for s in json.loads(done.stdout)["sites"] if "rolled back" in s["reason"]}
    assert kept == {"fragile"}
    failed = CliRunner().invoke(main, [*command, "0.000001"])
    assert failed.exit_code == 4
    assert not json.loads(failed.stdout)["evaluation"]["passed"]


def test_a_function_may_be_given_in_python(model: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def score(open_session: Any) -> float:
        seen.append(open_session().get_inputs()[0].name)
        return 1.0

    result = oc.optimize(model, tmp_path / "out.onnx", bits=4, evaluate=score, verify=False,
                         **OPTIONS)  # fmt: skip
    assert seen == ["x", "x"]
    assert result.report.evaluation == {
        "dense": 1.0,
        "compressed": 1.0,
        "max_drop": 0.0,
        "passed": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine.py", "does not name a function"),
        ("none.py:f", "no file"),
        ("mine.py:f", "no function 'f'"),
        ("mine.py:EXACT", "no function 'EXACT'"),
    ],
)
def test_what_is_no_function_is_a_usage_error(script: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_function(str(script.parent / text))


def test_a_function_that_fails_is_a_usage_error(model: Path, script: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="RuntimeError: no"):
        oc.optimize(model, tmp_path / "out.onnx", evaluate=f"{script}:broken", **OPTIONS)


def test_a_drop_without_a_measure_is_a_usage_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing is measured"):
        oc.optimize(model, tmp_path / "out.onnx", max_drop=0.1)


def sites(count: int) -> list[WeightSite]:
    use = Use("n", "MatMul", 1, "matmul")
    return [WeightSite(f"w{i}", (4, 4), "float32", (use,), "", 4, 4, True) for i in range(count)]


def test_blame_finds_the_weights_by_bisection() -> None:
    noises = {f"w{i}": 0.001 for i in range(64)} | {"w17": 0.5, "w40": 0.2}
    calls = 0

    def noise(chosen: Sequence[WeightSite]) -> float:
        nonlocal calls
        calls += 1
        return sum(noises[site.name] for site in chosen)

    found = blame(noise, sites(64), 0.1, 10**6)
    assert found is not None and [site.name for site in found] == ["w17", "w40"]
    assert calls <= 2 * 12 + 3
    assert blame(noise, sites(64), 0.001, 64 * 10) is None
    assert blame(noise, sites(64), 1.0, 10**6) == []
